"""The languages of the emoji world, and how each says a background."""

from __future__ import annotations

from typing import Literal, get_args

Language = Literal["zh", "en", "ja", "ko", "de", "es", "fr", "it", "pt", "ru", "tr", "id", "ar", "fa"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

#: A background in each language, around its colour's name, and what joins a concept's name and a background.
GRAMMAR: dict[Language, tuple[str, str]] = {
    "zh": ("{}背景", "，"), "en": ("{} background", ", "), "ja": ("{}の背景", "、"), "ko": ("{} 배경", ", "),
    "de": ("{} Hintergrund", ", "), "es": ("fondo {}", ", "), "fr": ("fond {}", ", "),
    "it": ("sfondo {}", ", "), "pt": ("fundo {}", ", "), "ru": ("{} фон", ", "), "tr": ("{} arka plan", ", "),
    "id": ("latar belakang {}", ", "), "ar": ("خلفية {}", "، "), "fa": ("پس‌زمینهٔ {}", "، "),
}  # fmt: skip

#: Background colours: RGB and the name in each language, in the form it has beside "background". Light enough
#: for dark drawings, far enough apart to be named.
COLOURS: dict[str, tuple[tuple[int, int, int], dict[Language, str]]] = {
    "white": ((252, 252, 252), {
        "zh": "白色", "en": "white", "ja": "白", "ko": "흰색", "de": "weißer",
        "es": "blanco", "fr": "blanc", "it": "bianco", "pt": "branco", "ru": "белый",
        "tr": "beyaz", "id": "putih", "ar": "بيضاء", "fa": "سفید",
    }),
    "red": ((232, 92, 92), {
        "zh": "红色", "en": "red", "ja": "赤", "ko": "빨간색", "de": "roter",
        "es": "rojo", "fr": "rouge", "it": "rosso", "pt": "vermelho", "ru": "красный",
        "tr": "kırmızı", "id": "merah", "ar": "حمراء", "fa": "قرمز",
    }),
    "orange": ((250, 176, 92), {
        "zh": "橙色", "en": "orange", "ja": "オレンジ", "ko": "주황색", "de": "oranger",
        "es": "naranja", "fr": "orange", "it": "arancione", "pt": "laranja", "ru": "оранжевый",
        "tr": "turuncu", "id": "oranye", "ar": "برتقالية", "fa": "نارنجی",
    }),
    "yellow": ((250, 236, 120), {
        "zh": "黄色", "en": "yellow", "ja": "黄色", "ko": "노란색", "de": "gelber",
        "es": "amarillo", "fr": "jaune", "it": "giallo", "pt": "amarelo", "ru": "жёлтый",
        "tr": "sarı", "id": "kuning", "ar": "صفراء", "fa": "زرد",
    }),
    "green": ((128, 208, 136), {
        "zh": "绿色", "en": "green", "ja": "緑", "ko": "초록색", "de": "grüner",
        "es": "verde", "fr": "vert", "it": "verde", "pt": "verde", "ru": "зелёный",
        "tr": "yeşil", "id": "hijau", "ar": "خضراء", "fa": "سبز",
    }),
    "blue": ((112, 172, 244), {
        "zh": "蓝色", "en": "blue", "ja": "青", "ko": "파란색", "de": "blauer",
        "es": "azul", "fr": "bleu", "it": "blu", "pt": "azul", "ru": "синий",
        "tr": "mavi", "id": "biru", "ar": "زرقاء", "fa": "آبی",
    }),
    "purple": ((168, 124, 228), {
        "zh": "紫色", "en": "purple", "ja": "紫", "ko": "보라색", "de": "violetter",
        "es": "morado", "fr": "violet", "it": "viola", "pt": "roxo", "ru": "фиолетовый",
        "tr": "mor", "id": "ungu", "ar": "بنفسجية", "fa": "بنفش",
    }),
    "pink": ((252, 188, 220), {
        "zh": "粉色", "en": "pink", "ja": "ピンク", "ko": "분홍색", "de": "rosa",
        "es": "rosa", "fr": "rose", "it": "rosa", "pt": "rosa", "ru": "розовый",
        "tr": "pembe", "id": "merah muda", "ar": "وردية", "fa": "صورتی",
    }),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
