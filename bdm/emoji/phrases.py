"""Synonyms and free phrases, as people type them and no caption has them.

What a branch makes of them says whether its text encoder understands, or knows the captions by heart. Each
line is a concept's emoji and phrases for it, in one language; each phrase means one concept of the world.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .world import Language, World

_PHRASES: dict[Language, str] = {
    "zh": """
        🐶 一只可爱的小狗|小狗狗的脸
        🐱 小猫咪的脸|一张猫的脸
        🐼 国宝大熊猫|爱吃竹子的黑白熊
        🏮 喜庆的大红灯笼|挂在门口的红色灯笼
        🧧 过年发的压岁钱|装着钱的红色纸包
        🥮 中秋节吃的糕点|一块圆圆的中秋月饼
        🧨 过年放的鞭炮|点燃的炮仗
        🥟 一盘饺子皮包的馅|热腾腾的水饺
        🐉 腾云驾雾的中国龙|一条长长的神龙
        🥢 一双筷子|吃饭用的两根小棍
        🍜 一碗热腾腾的汤面|拉面
        🍚 一碗白米饭|白饭
        🍵 一杯绿茶|茶水
        🫖 泡茶用的壶|一把紫砂茶壶
        🎆 夜空中绽放的礼花|盛大的烟火
        🪭 手里拿的扇子|古代文人的折叠扇
        🪷 池塘里的荷花|出淤泥而不染的花
        🐯 老虎的脸
        🐎 奔跑的骏马|一匹马
        🐍 一条毒蛇|长虫
        🐇 一只白兔|小兔子
        🐒 小猴儿|调皮的猴
        🐓 打鸣的雄鸡|大公鸡
        🐖 一头肥猪|大肥猪
        🐢 慢吞吞的乌龟|长寿的龟
        🦀 大闸蟹|横着走的螃蟹
        🦐 一只大虾|基围虾
        🦆 一只野鸭|水里游的鸭
        🦚 开屏的孔雀|羽毛华丽的鸟孔雀
        🍑 一颗水蜜桃|桃子
        🍊 蜜橘|一个柑橘
        🍐 雪梨|一个鸭梨
        🥒 青瓜|一根黄瓜
        🧄 大蒜|一头蒜
        🫚 生姜|一块老姜
        🥜 花生米|一把花生
        🌰 糖炒栗子|一颗板栗
        🧋 波霸奶茶|一杯珍奶
        🥁 打击乐器鼓|一面小鼓
        🧮 珠算用的算盘|老式计算工具
        🪁 天上的纸鸢|放飞的风筝
        💰 一袋钱|满满的钱袋子
        📜 古老的羊皮卷|一卷古书
        🏓 乒乓球拍|打乒乓
        🌕 十五的圆月|一轮明月
        ☯ 太极图|八卦的阴阳鱼
        🏠 一座小屋|温馨的家
        🚗 一辆小汽车|私家轿车
        🚲 脚踏车|一辆单车
        🚌 公共汽车|一辆巴士
        🚀 飞向太空的火箭|宇宙火箭
        ⛵ 海上的帆船|扬帆的小船
        📷 照相机|数码相机
        📺 老电视|一台电视
        💻 手提电脑|一台笔记本
        📱 智能手机|一部手机
        🔑 一把钥匙|开锁的钥匙
        🔨 榔头|一把铁锤
        💡 电灯泡|发光的灯泡
        🪑 一把木椅|凳子椅子
        👗 漂亮的裙子|一条连衣裙
        👓 一副近视镜|戴的眼镜
        🎩 魔术师的帽子|黑色高礼帽
        🍅 番茄|红红的番茄
        🌽 一根苞米|玉米棒子
        🥕 红萝卜|兔子爱吃的胡萝卜
        🍓 一颗鲜红的草莓|新鲜草莓
        🍌 黄色的香蕉|一根香蕉
        🍉 一块西瓜|夏天的西瓜
        🍕 一块比萨|意大利披萨饼
        🍔 牛肉汉堡包|麦当劳的汉堡
        🍞 一片吐司|早餐面包
        🎂 庆祝生日的蛋糕|插着蜡烛的蛋糕
        🎁 包好的礼物盒|一份生日礼物
        🌹 一朵红玫瑰|情人节的玫瑰花
        🌻 向着太阳的葵花|一朵葵花
        🌈 雨后的彩虹|七色彩虹
        🐘 长鼻子的大象|一头大象
        🦋 花丛中的蝴蝶|一只彩蝶
    """,
    "ja": """
        🏮 赤い提灯|お祭りの提灯
        🐶 かわいい子犬の顔|わんちゃんの顔
        🐱 にゃんこの顔|猫ちゃんの顔
        🐼 白黒の熊パンダ|笹を食べる動物
        🍜 熱々のラーメン一杯
        🍣 握り寿司|お寿司
        🌸 桜の花|満開のさくら
        🗻 日本一高い山富士山|富士の山
        🐢 のろい亀|長生きの亀
        🐎 走る馬
        🦀 おいしい蟹
        🍎 真っ赤なりんご
        🚗 赤い車|自動車一台
        🚲 チャリンコ
        🏠 小さな家|マイホーム
        🎂 誕生日のろうそくを立てたケーキ
        🎁 誕生日の贈り物
        🔑 ドアの鍵|家の鍵
        ⛄ 雪で作った人形
        🌈 雨上がりの虹
        🐘 鼻の長い動物の象
        🍵 温かい緑茶
        🎆 夜空の花火大会
        👘 日本の着物|浴衣姿の着物
    """,
    "ko": """
        🐶 귀여운 강아지 얼굴
        🐼 대나무를 먹는 판다
        🏠 작은 집 한 채
        🚗 빨간 자동차 한 대
        🍎 빨간 사과 하나
        🍜 뜨거운 라면 한 그릇
        🐢 느린 거북이
        🎂 생일 축하 케이크
        🌹 빨간 장미 한 송이
        🔑 집 열쇠
        🐘 코가 긴 코끼리
        🚲 두 바퀴 자전거
        ⛄ 눈으로 만든 눈사람
        🦀 바닷게 한 마리
    """,
    "de": """
        🐶 ein süßer kleiner Hund
        🐼 ein Pandabär
        🏠 ein kleines Häuschen
        🚗 ein rotes Auto
        🍎 ein roter Apfel
        🚲 ein altes Fahrrad
        🎂 eine Torte zum Geburtstag
        🌹 eine rote Rose
        🔑 der Schlüssel zur Haustür
        🐘 ein Elefant mit langem Rüssel
        ⛄ ein Mann aus Schnee
        🐢 eine langsame Schildkröte
        🍕 ein Stück Pizza
        🦋 ein bunter Schmetterling
    """,
    "fr": """
        🐶 un petit chien mignon
        🐼 un panda géant
        🏠 une petite maison
        🚗 une voiture rouge
        🍎 une pomme bien rouge
        🚲 une bicyclette
        🎂 un gâteau pour l'anniversaire
        🌹 une belle rose rouge
        🔑 la clé de la porte
        🐘 un grand éléphant
        🐢 une tortue lente
        🦋 un joli papillon
    """,
    "es": """
        🐶 un perrito lindo
        🐼 un oso panda
        🏠 una casita
        🚗 un auto rojo
        🍎 una manzana muy roja
        🚲 una bici
        🎂 un pastel de cumpleaños
        🌹 una rosa muy bonita
        🔑 la llave de la puerta
        🐘 un elefante grande
        🐢 una tortuga lenta
        🦋 una linda mariposa
    """,
}


@dataclass(frozen=True)
class Phrase:
    """A free phrase and the concept that it means.

    Attributes:
        concept: index in the world.
        language: of the text.
        text: the phrase.
    """

    concept: int
    language: Language
    text: str


def read_phrases(world: World, languages: tuple[Language, ...] = ()) -> list[Phrase]:
    """The phrases whose concepts a world has, of some languages or of all.

    Raises:
        UserError: a language of which there are none.
    """
    unknown = [language for language in languages if language not in _PHRASES]
    if unknown:
        raise UserError(f"there are no phrases in {unknown[0]!r}; allowed are {', '.join(_PHRASES)}")
    numbers = {chr(concept.code): i for i, concept in enumerate(world.concepts)}
    found = []
    for language in languages or tuple(_PHRASES):
        for line in _PHRASES[language].strip().splitlines():
            emoji, _, texts = line.strip().partition(" ")
            if emoji in numbers:
                found += [Phrase(numbers[emoji], language, text) for text in texts.split("|")]
    return found
