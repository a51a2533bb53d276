"""File names out of patterns: Chinese stays, no name is too long or means something to a file system."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdm import Request
from bdm.drawing.picture_names import apart, check_pattern, picture_name, safe_name
from bdm.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("[number]", "00003.png"),
        ("[row]-[seed].jpg", "4-7.jpg"),
        ("[seed]-[prompt]", "7-红灯笼，蓝色背景.png"),
        ("[Seed] [steps] [cfg].webp", "7 30 2.webp"),
        ("[prompt_en]", "a_b.png"),
        ("[prompt_spaces]-[sampler]", "红灯笼，蓝色背景-DPM++ 2M.png"),
        ("plain", "plain.png"),
    ],
)
def test_words_in_brackets(pattern, name):
    request = Request(prompt="红灯笼，蓝色背景", seed=7, guidance=2.0, sampler="DPM++ 2M", prompt_en="a b")
    check_pattern(pattern)
    assert picture_name(pattern, request, 3) == name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[sead]", r"\[sead\] stands for nothing.*\[seed\]"),
        ("[date]-[seed]", "would give every picture another name"),
        ("[seed].bmp", "allowed endings"),
    ],
)
def test_other_words_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        check_pattern(pattern)


@given(st.text(max_size=400), st.sampled_from(["[prompt]", "[prompt]-[seed].jpg", "x[prompt_spaces]y"]))
def test_any_prompt_makes_a_name(prompt, pattern):
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        return
    name = picture_name(pattern, Request(prompt=prompt), 0)
    assert 0 < len(name.encode()) <= 200
    assert not set(name) & set('<>:"/\\|?*\0\n')
    assert name.endswith((".png", ".jpg"))
    assert name.strip() == name
    assert not name.startswith(".")


def test_names_of_devices_and_folders():
    assert safe_name("CON") == "_CON"
    assert safe_name("com1.txt") == "_com1.txt"
    assert safe_name("../../etc/passwd") == "_.._etc_passwd"
    assert safe_name("..") == ""
    assert picture_name("[prompt]", Request(prompt=".."), 0) == "_.png"


def test_long_chinese_is_cut_between_characters():
    name = picture_name("[prompt]", Request(prompt="灯" * 500), 0)
    assert name == "灯" * 65 + ".png"


def test_names_that_are_taken_are_numbered():
    assert apart(["a.png", "A.png", "a.png", "b.png", "a-2.png"]) == [
        "a.png", "A-2.png", "a-3.png", "b.png", "a-2-2.png",
    ]  # fmt: skip
