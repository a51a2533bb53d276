"""One box of two languages."""

import re

from hypothesis import given
from hypothesis import strategies as st

from bdm.text.sides import is_native, split_sides


def test_parts_go_to_the_side_of_their_script():
    assert split_sides("红灯笼，masterpiece, 蓝色背景") == ("红灯笼，蓝色背景", "masterpiece")
    assert split_sides("dragon, best quality") == ("", "dragon, best quality")
    assert split_sides("дом, house、家") == ("дом, 家", "house")
    assert split_sides("") == ("", "")


def test_what_belongs_together_stays_together():
    assert split_sides("(红灯笼, dragon:1.2), blue") == ("(红灯笼, dragon:1.2)", "blue")
    assert split_sides("龙 AND a, b") == ("龙 AND a, b", "")
    assert split_sides("红\\(灯, x") == ("红\\(灯", "x")


def test_a_call_of_an_adapter_is_english_whatever_its_name():
    assert split_sides("龙, <lora:墨:0.8>") == ("龙", "<lora:墨:0.8>")


@given(st.text(alphabet="龙a1 ,，、()[]<>:\\\n", max_size=40))
def test_nothing_is_lost_and_no_side_holds_the_others_part(text):
    native, english = split_sides(text)
    letters = re.compile(r"[^,，、;；。\s]")
    assert sorted(letters.findall(native + english)) == sorted(letters.findall(text))
    assert not is_native(english)
