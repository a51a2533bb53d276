"""Variants and wildcards: dynamicprompts' own results, and what holds for every text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm.errors import UserError
from bdm.text.variants import expand, expansions, read_variants
from bdm.text.wildcards import Wildcards

TEMPLATES = (
    "{a|b} c", "{2$$a|b|c}", "{1-2$$a|b}", "{2$$ and $$a|b|c}", "{0.5::a|b}", "{a|}", "{a|{b|c}}", "a } b",
    "{a}", "{}", "__colours__", "{2$$__colours__}", "__动物/猫__", "__col*__", "{a|b}|c", "{1-$$a|b}",
    "{-2$$a|b}", "{a | b}", "(x:{1|2})", "{3$$a|b}", "[{a|b}:c:0.5]", "{0-1$$a|b}", "{红|绿}灯笼，{大|小}",
    "__*__", "__动物/*__", "{2$$a|{b|c}}", "{{a|b}|c} {d|e}", "{2$$0.1::a|b|c}",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "动物").mkdir()
    (tmp_path / "colours.txt").write_text("red\n# a comment\n\nblue\n{dark|light} green\n", encoding="utf-8")
    (tmp_path / "动物" / "猫.txt").write_bytes("黑猫\n白猫".encode("gb18030"))
    return tmp_path


@pytest.mark.parametrize("template", TEMPLATES)
def test_they_stand_for_the_same_texts_as_in_dynamicprompts(folder, template):
    generators = pytest.importorskip("dynamicprompts.generators")
    from dynamicprompts.wildcards import WildcardManager

    (folder / "动物" / "猫.txt").write_text("黑猫\n白猫", encoding="utf-8")
    theirs = generators.CombinatorialPromptGenerator(wildcard_manager=WildcardManager(folder))
    expected = set(theirs.generate(template, 500))
    files = Wildcards.of(folder)
    assert set(expansions(template, files)) == expected
    chosen = {expand(template, seed, files) for seed in range(40)}
    assert chosen <= expected
    assert len(chosen) > 1 or len(expected) == 1


def test_the_same_seed_chooses_the_same(folder):
    files = Wildcards.of(folder)
    text = "{1-3$$__动物/猫__|__colours__|c|d}"
    assert [expand(text, seed, files) for seed in range(30)] == [
        expand(text, seed, files) for seed in range(30)
    ]
    assert len({expand("{0.9::a|0.1::b}", seed) for seed in range(100)}) == 2
    share = sum(expand("{3::a|b}", seed) == "a" for seed in range(2000)) / 2000
    assert 0.7 < share < 0.8


def test_files_that_are_not_there_or_name_themselves(folder):
    (folder / "loop.txt").write_text("x __loop__")
    files = Wildcards.of(folder)
    for text in ("__none__", "a__b__c", "__../../secret__", r"\{a\|b\}", "__"):
        assert expand(text, 0, files) == text
    assert expand("__loop__", 0, files).endswith("__loop__")
    with pytest.raises(UserError, match="no such folder"):
        Wildcards.of(folder / "none")


def test_what_is_not_known_stays_text_and_is_said():
    for text, place in (("a {b", 2), ("{@a|b}", 0), ("{$$a|b}", 0)):
        (notice,) = read_variants(text).notices
        assert notice.start == place
        assert expand(text, 1) == text
    deep = "{" * 60 + "a" + "}" * 60
    assert str(read_variants(deep)) == deep
    assert "a" in expand(deep, 0)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(["{", "}", "|", "2$$", "0.5::", "__", "a", " ", "\\", "1-2$$, $$"])).map("".join)
)
def test_printing_is_the_identity_and_nothing_fails(text):
    assert str(read_variants(text)) == text
    found = expand(text, random.Random(len(text)).randrange(100))
    if "{" not in text:
        assert found == text
