"""Texts of a sample as they are found: bytes of any common encoding, JSON, one caption or a list of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Any

#: Marks at the beginning of a text that say how it is encoded; the longer ones first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Of the Chinese characters of a text in GB18030 so many are common ones. Bytes of other encodings are read
#: as rare ones.
_COMMON = 0.8
#: Lead bytes of GB2312's 3,755 common characters.
_COMMON_ROWS = range(0xB0, 0xD8)


def decode_text(content: bytes) -> str:
    """The text of a file: UTF-8, what its mark says, or Chinese in GB18030 (GBK, GB2312).

    Raises:
        ValueError: it is none of these for certain.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("gb18030")
        if _is_chinese(text) and not _is_korean(content):
            return text
        raise ValueError("it is neither UTF-8 nor Chinese in GB18030") from None


def _is_chinese(text: str) -> bool:
    """Whether a text is Chinese as people write it: common characters, and nothing that they do not use."""
    written = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    others = [c for c in text if not c.isascii() and not "\u4e00" <= c <= "\u9fff"]
    if not written or any(map(_is_foreign, others)):
        return False
    return sum(map(_is_common, written)) >= _COMMON * len(written) and len(others) <= len(written)


def _is_foreign(character: str) -> bool:
    """Whether no Chinese text holds a character: kana, those of nobody, and what cannot be seen."""
    return (
        "\u3040" <= character <= "\u30ff"
        or "\ue000" <= character <= "\uf8ff"
        or not (character.isprintable() or character.isspace())
    )


def _is_korean(content: bytes) -> bool:
    """Whether bytes may as well be Korean, whose syllables lie where Chinese has common characters."""
    try:
        text = content.decode("euc_kr")
    except UnicodeDecodeError:
        return False
    return all(c.isascii() or "\uac00" <= c <= "\ud7a3" for c in text)


def _is_common(character: str) -> bool:
    try:
        return character.encode("gb2312")[0] in _COMMON_ROWS
    except UnicodeEncodeError:
        return False


def read_facts(content: bytes, text: bytes) -> tuple[dict[str, Any], str]:
    """What a sample's JSON says, and its text file under ``"txt"``; and what is wrong with either.

    One that is damaged does not discard the other.

    Args:
        content: of the JSON file; empty where there is none.
        text: of the text file; likewise.
    """
    facts: dict[str, Any] = {}
    wrong = []
    try:
        found = json.loads(decode_text(content)) if content else {}
        facts = found if isinstance(found, dict) else {}
    except (ValueError, RecursionError) as error:
        wrong.append(f"its JSON is damaged ({error})")
    try:
        if text:
            facts = facts | {"txt": decode_text(text)}
    except ValueError as error:
        wrong.append(f"its text is damaged ({error})")
    return facts, " and ".join(wrong)


def texts_of(value: Any) -> list[str]:
    """The texts that a field holds: itself, or those of a list; without blanks around, NUL and marks.

    Empty ones are left out.
    """
    if isinstance(value, str):
        cleaned = value.replace("\0", "").replace("\ufeff", "").strip()
        return [cleaned] if cleaned else []
    if isinstance(value, list | tuple):
        return [text for part in value if isinstance(part, str) for text in texts_of(part)]
    return []


def weighted_texts(facts: Mapping[str, Any], weights: Mapping[str, float]) -> list[tuple[str, float]]:
    """All texts of the fields, each with its weight; those of a list share that of their field."""
    found = []
    for name, weight in weights.items():
        texts = texts_of(facts.get(name))
        found += [(text, weight / len(texts)) for text in texts]
    return found


def is_whole(text: str) -> bool:
    """Whether no character was cut in two: JSON can hold half of an emoji (of a surrogate pair)."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
