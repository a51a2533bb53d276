"""Texts as the web has them: of any encoding, in lists, with marks and halves of characters."""

import codecs
import json

import pytest

from bdm.data.captions import decode_text, read_facts, texts_of
from bdm.data.pictures import PictureRules
from bdm.data.source import UnreadableExample

CHINESE = "一只白猫坐在红色的椅子上，望着窗外的雨。"


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "gbk", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_of_common_encodings_are_read(encoding):
    assert decode_text(CHINESE.encode(encoding)) == CHINESE
    facts, wrong = read_facts(json.dumps({"caption": CHINESE}, ensure_ascii=False).encode(encoding), b"")
    assert (facts, wrong) == ({"caption": CHINESE}, "")


@pytest.mark.parametrize(
    "content",
    [
        "椅子に座っている白い猫が窓の外の雨を見ている".encode("shift_jis"),
        "의자에 앉아 있는 하얀 고양이".encode("euc_kr"),
        "白貓坐在紅色的椅子上望著窗外的雨".encode("big5"),
        "Ein Käfer über den Bäumen, ganz schön größer".encode("latin-1"),
        bytes(range(128, 256)),
    ],
)
def test_what_is_not_recognised_for_certain_is_no_text(content):
    with pytest.raises(ValueError, match="neither UTF-8 nor Chinese|codec"):
        decode_text(content)


def test_a_damaged_text_does_not_discard_the_json_nor_the_other_way():
    bad = "größer".encode("latin-1")
    facts, wrong = read_facts(b'{"caption": "x"}', bad)
    assert facts == {"caption": "x"}
    assert "its text is damaged" in wrong
    for damaged in (b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        facts, wrong = read_facts(damaged, b"y")
        assert facts == {"txt": "y"}
        assert "its JSON is damaged" in wrong


def test_lists_are_captions():
    rules = PictureRules(captions={"caption": 3.0, "txt": 1.0})
    found = rules.captions_of("k", {"caption": ["a", " ", None, 5, "b\0c", "\ud83d"], "txt": "\ufeff d\n"})
    assert found == [("a", 1.0), ("bc", 1.0), ("d", 1.0)]
    assert rules.caption("k", {"caption": ["a", "b"]}) == "a"
    with pytest.raises(UnreadableExample, match="no caption"):
        rules.captions_of("k", {"caption": [], "txt": "\0"})
    assert texts_of({"a": "b"}) == texts_of(None) == texts_of(3) == []


def test_marks_are_not_part_of_a_text():
    assert decode_text(codecs.BOM_UTF8 + b"x") == "x"
    assert texts_of("\ufeffx") == ["x"]
