"""A1111's prompt grammar: facts about it (``prompt_vectors.json``), and what holds for every text."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdm.errors import UserError
from bdm.text.english import encode_english
from bdm.text.grammar import Alternation, Lora, Scheduled, walk
from bdm.text.prompt import LARGEST, parse_emphasis
from bdm.text.reader import DEEPEST, read_prompt
from bdm.text.rules import A1111, OFFICIAL, PromptRules
from bdm.text.schedule import composition, prompt_schedule
from bdm.text.splitting import Reading, comma_ids, tokenize
from bdm.text.vocabulary import chinese_clip_tokenizer, clip_tokenizer

VECTORS = json.loads((Path(__file__).parent / "prompt_vectors.json").read_text(encoding="utf-8"))

ENGLISH = Reading()
PIECES = (
    "()[]:|\\<>{}_$，、（）：｜ \n", *"()[]:|", "BREAK", " AND ", "a", "红灯笼", "1.3", ":0.5]", "[a:b:",
    "<lora:ink:0.8>", "<lora:", "(x:1e9)", "(((", f":{'9' * 200})", "é\u0301", "\ud800", "\0",
)  # fmt: skip
PROMPTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))


@pytest.mark.parametrize(("prompt", "pairs"), VECTORS["emphasis"])
def test_emphasis(prompt, pairs):
    assert parse_emphasis(prompt) == [tuple(pair) for pair in pairs]


@pytest.mark.parametrize(("prompt", "steps", "schedule"), VECTORS["schedule"])
def test_schedules(prompt, steps, schedule):
    assert prompt_schedule(prompt, steps) == [tuple(stage) for stage in schedule]


@pytest.mark.parametrize(("prompt", "parts"), VECTORS["joined"])
def test_joined_prompts(prompt, parts):
    assert composition(prompt) == [tuple(part) for part in parts]


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


def chunks_of(prompt, tokenizer, layout, reading=ENGLISH):
    tokens = tokenize([prompt], tokenizer, layout, reading=reading)
    counts = tokens.mask[0].sum(1).tolist()
    return [row[1 : count - 1] for row, count in zip(tokens.ids[0].tolist(), counts)]


@pytest.mark.parametrize(("name", "words", "sizes"), VECTORS["chunks"])
def test_chunks(clip, name, words, sizes):
    from bdm.text.english import _layout_of

    prompt = " ".join(" ".join([word] * count) for word, count in words)
    found = chunks_of(prompt, clip, _layout_of(clip))
    assert list(map(len, found)) == sizes
    said = [token for chunk in found for token in chunk]
    plain = " ".join(word for word in prompt.split() if word != "BREAK")
    assert said == clip(plain, add_special_tokens=False).input_ids, "no token is lost or doubled"


@settings(deadline=None, max_examples=300)
@given(PROMPTS, st.booleans(), st.booleans())
def test_printing_is_the_identity_and_reading_never_fails(text, full_width, composed):
    prompt = read_prompt(text, full_width, composed)
    assert str(prompt) == text
    assert read_prompt(str(prompt), full_width, composed) == prompt
    for part in prompt.parts:
        assert math.isfinite(part.weight)
        for node in walk(part.nodes):
            assert text.startswith(str(node), node.start), "every node knows its place"
    assert all(0 <= notice.start < max(1, len(text)) for notice in prompt.notices)


@settings(deadline=None, max_examples=300)
@given(PROMPTS, st.booleans(), st.integers(1, 30))
def test_weights_are_finite_and_schedules_end_with_the_drawing(text, full_width, steps):
    runs = parse_emphasis(text, full_width)
    assert all(math.isfinite(weight) and abs(weight) <= LARGEST for _, weight in runs)
    assert all(a[1] != b[1] for a, b in zip(runs, runs[1:])), "runs of equal weight are one"
    ends = [end for end, _ in prompt_schedule(text, steps)]
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert ends[0] >= 1


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_characters="()[]\\:|（）：｜<", exclude_categories=("Cs",))))
def test_text_without_syntax_is_unchanged(text):
    if "BREAK" in text or "AND" in text:
        return
    for full_width in (False, True):
        assert parse_emphasis(text, full_width) == [(text, 1.0)]
        assert composition(text, full_width) == [(text, 1.0)]
        assert not read_prompt(text, full_width).notices
    assert prompt_schedule(text, 7) == [(7, text)]


@settings(deadline=None, max_examples=100)
@given(st.text("ab (){}[]:|.1<>\\", max_size=30))
def test_full_width_marks_are_read_as_their_narrow_ones(text):
    """Where each is syntax: the runs differ in the marks that stayed text alone."""
    narrow = str.maketrans("（）：", "():")
    wide = text.translate(str.maketrans("():", "（）："))
    runs = [(said.translate(narrow), weight) for said, weight in parse_emphasis(wide, full_width=True)]
    if "\\:" not in text:
        assert runs == parse_emphasis(text)


def test_notices_name_their_place():
    cases = {
        "a cat:1.2.3) (x:1.2.3)": (5, "is no number"),
        "(a BREAK b:1.2)": (3, "BREAK inside of brackets"),
        "[a:b:3] c | d": (10, "stands in no"),
        "<lora:ink:strong> a": (0, "so it is text"),
        "film 16:9": (7, "its weight"),
        f"(a:{'9' * 400})": (1, "cut to"),
    }
    for text, (place, said) in cases.items():
        (notice, *_) = read_prompt(text).notices
        assert notice.start == place, text
        assert said in notice.said
        assert str(notice).startswith(f"character {place + 1}: ")
    assert not read_prompt("比例16:9", full_width=True).notices, "a native prompt alone has no weight"


def test_adapters_are_named_with_their_strengths():
    prompt = read_prompt("a <lora:ink> [b<lora:oil:0.5>:0.4] <lora:wash:0.2:0.7> <lora:x:te=1:unet=0>")
    found = [(lora.name, lora.text_strength, lora.unet_strength) for lora in prompt.loras]
    assert found == [("ink", 1, 1), ("oil", 0.5, 0.5), ("wash", 0.2, 0.7), ("x", 1, 0)]
    assert all(isinstance(lora, Lora) for lora in prompt.loras)


def test_trees_hold_what_is_scheduled():
    (part,) = read_prompt("（一只[红：绿:0.5]｜[猫|狗]）", full_width=True).parts
    kinds = [type(node) for node in walk(part.nodes) if type(node) in (Scheduled, Alternation)]
    assert kinds == [Scheduled, Alternation]
    deep = "[" * (DEEPEST + 5) + "a" + ":1]" * (DEEPEST + 5)
    assert str(read_prompt(deep)) == deep
    assert prompt_schedule(deep, 3)[-1][0] == 3


def test_native_chunks_end_behind_chinese_commas(native):
    tokenizer = chinese_clip_tokenizer()
    assert len(comma_ids(tokenizer, ",，、。")) == 4
    reading = Reading(A1111, native=True)
    for comma in ",，、。":
        found = chunks_of("月" * 40 + comma + "日" * 20, tokenizer, native.layout, reading)
        assert list(map(len, found)) == [41, 20], comma
    assert list(map(len, chunks_of("月" * 40 + "；" + "日" * 20, tokenizer, native.layout, reading))) == [
        50,
        11,
    ]


@torch.no_grad()
def test_the_modes_differ_as_they_say(native, text_encoder, clip):
    long = "月" * 40 + "，" + "日" * 20
    both = native.encode([long], A1111), native.encode([long], OFFICIAL)
    assert [features.shape[1] for features in both] == [104, 102]
    alone = torch.cat([native.encode(["月" * 40 + "，"])[0], native.encode(["日" * 20])[0]])
    torch.testing.assert_close(both[0][0], alone, atol=1e-5, rtol=1e-4)
    for rules, positions in ((A1111, 154), (OFFICIAL, 152)):
        assert encode_english(["lantern " * 100], text_encoder, clip, 1, rules).shape[1] == positions
    assert encode_english(["lantern " * 600], text_encoder, clip, 1, A1111).shape[1] == 77 * 8, "no limit"
    torch.testing.assert_close(
        encode_english(["cat BREAK dog"], text_encoder, clip, 1, A1111)[0],
        torch.cat(list(encode_english(["cat", "dog"], text_encoder, clip))),
        atol=1e-5,
        rtol=1e-4,
    )


@torch.no_grad()
def test_native_weights_keep_each_chunks_mean(native):
    native.model.encoder.layer[-1].output.LayerNorm.bias.fill_(0.5)
    plain, weighed = (native.encode([text], A1111)[0] for text in ("红灯笼", "红(灯笼:1.5)"))
    weights = torch.ones(52)
    weights[2:4] = 1.5
    expected = plain * weights[:, None]
    torch.testing.assert_close(weighed, expected * plain.mean() / expected.mean(), atol=1e-5, rtol=1e-4)
    assert torch.equal(native.encode(["红(灯笼:1.5)"]), native.encode(["红灯笼"])), "ignored officially"
    rows = native.encode_each(["红(灯笼:1.5)", "月" * 60], A1111)
    together = native.encode(rows, A1111)
    torch.testing.assert_close(
        together, native.encode(["红(灯笼:1.5)", "月" * 60], A1111), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_letters_are_changed_where_it_is_asked_for(native):
    pytest.importorskip("opencc")
    simple = PromptRules(simplified=True)
    assert torch.equal(native.encode(["紅燈籠，頭髮"], simple), native.encode(["红灯笼，头发"], A1111))
    full = PromptRules(punctuation="full")
    assert torch.equal(
        native.encode(["红(灯笼:1.3), 龙!"], full), native.encode(["红(灯笼:1.3)， 龙！"], A1111)
    )


@pytest.mark.parametrize(
    "wrong", [dict(emphasis="comfy"), dict(chunks=1), dict(simplified="yes"), dict(punctuation=None)]
)
def test_unknown_rules_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; allowed are"):
        PromptRules(**wrong)
