import hashlib
import json
from collections import Counter
from importlib.metadata import version
from typing import get_args

import numpy as np
import pytest
import torch

from bdm.config.data import Colour, EmojiConfig, Language, Treatment
from bdm.data.batch import fixed_batch, make_batch, stream
from bdm.data.order import draw_indices
from bdm.data.source import to_pixels, to_unit_range
from bdm.emoji import world as emoji_world
from bdm.emoji.world import (
    COLOUR_NAMES,
    COLOURS,
    GRAMMAR,
    LANGUAGES,
    TREATMENTS,
    EmojiSource,
    World,
    read_names,
)
from bdm.errors import UserError


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_world_has_its_groups_and_is_always_the_same(world):
    groups = [c.group for c in world.concepts]
    assert len(world.concepts) == 640
    assert groups.count("native") >= 60
    assert groups.count("different") >= 60
    again = World()
    assert again.concepts == world.concepts
    assert again.held_out == world.held_out
    names = {c.names["zh"] for c in world.concepts if c.group == "native"}
    assert {"红包", "月饼", "红灯笼", "爆竹", "饺子", "龙"} <= names


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_caption_means_one_concept(world, language):
    for some in (world, World(0)):
        names = [c.names[language] for c in some.concepts if language in c.names]
        assert len(set(names)) == len(names)
    assert all(language in c.names for c in world.concepts), "and all languages name the usual world's"
    backgrounds = {world.caption(None, colour, language) for colour in COLOUR_NAMES}
    assert len(backgrounds) == len(COLOUR_NAMES)
    assert not backgrounds & {c.names[language] for c in world.concepts}


@pytest.mark.skipif(version("emoji") != "2.16.0", reason="other releases of emoji may have other names")
def test_further_languages_change_nothing_of_the_first_ones_worlds(world):
    """Digests from before there were any: concepts, pairs held out, rows in their order."""

    def digest(facts):
        return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()[:16]

    def seen(source):
        return digest([[r.concept, r.colour, r.variant, r.look, r.treatment, r.caption] for r in source.rows])

    first = ("zh", "en", "ja")
    concepts = [[c.code, c.group, [c.names[language] for language in first]] for c in world.concepts]
    assert digest(concepts) == "5466f810864d1cea"
    assert digest(sorted(world.held_out)) == "08d5d95d9be670e3"
    assert digest(sorted(World(300, 1).held_out)) == "133cf2bf9f293ada"
    assert [seen(EmojiSource(world, language)) for language in first] == [
        "596267d65ba0b13b", "eee2478bcb3b670e", "5b57deabdff6bb51"
    ]  # fmt: skip
    assert [seen(EmojiSource(world, language).validation) for language in first] == [
        "ad4dca39a56e6880", "e992bd3560f4c48b", "56dbaada0b1e8635"
    ]  # fmt: skip
    options = dict(looks=("twemoji", "openmoji"), treatments=TREATMENTS, limit=40, held_out="all", variants=4)
    assert [seen(EmojiSource(world, language, **options)) for language in first] == [
        "8021bd65e7d80788", "883e1edd84e08169", "f0a2f708f9fd42ee"
    ]  # fmt: skip


def test_several_languages_take_turns(world):
    """The same pictures as in one language, each named in one of them, always the same."""
    languages = ("zh", "ja", "ko", "fa", "de")
    one, several = (EmojiSource(world, language, variants=5) for language in ("zh", languages))
    assert [(r.concept, r.colour, r.variant, r.look) for r in several.rows] == [
        (r.concept, r.colour, r.variant, r.look) for r in one.rows
    ]
    assert several.rows == EmojiSource(world, languages).rows
    uses = Counter(row.language for row in several.rows)
    assert max(uses.values()) < 1.02 * min(uses.values())
    for facts in ("concept", "colour", "variant"):
        combined = Counter((row.language, getattr(row, facts)) for row in several.rows)
        assert len(combined) == len(languages) * len({getattr(row, facts) for row in several.rows}), facts
    over_colours = {(row.concept, row.variant, row.language) for row in several.rows}
    # All but where the one colour of a language is held out: no language has a variant for itself.
    assert len(over_colours) > 0.9 * 640 * 5 * len(languages)
    for row in several.rows[::97]:
        name = None if row.variant == 4 else row.concept
        assert row.caption == world.caption(name, row.colour if row.variant else None, row.language)
    held_out = several.validation
    assert {(r.concept, r.colour) for r in held_out.rows} == world.held_out
    assert {r.language for r in held_out.rows} == set(languages)
    every = EmojiSource(world, LANGUAGES, limit=50)
    assert {r.language for r in every.rows} == set(LANGUAGES)
    different = {r.look for r in every.rows if world.concepts[r.concept].group == "different"}
    assert different == {"twemoji", "openmoji"}
    for row in every.rows:
        assert row.look == world.concepts[row.concept].look(row.language)


def test_concepts_without_a_name_have_no_rows_in_that_language(monkeypatch):
    """And of two with the same name, only the first keeps it."""
    names = read_names()
    lantern, cake, dragon = (ord(character) for character in "🏮🥮🐉")
    del names[lantern]["ko"]
    names[dragon]["ko"] = names[cake]["ko"]
    monkeypatch.setattr(emoji_world, "read_names", lambda: names)
    world = World()
    assert world.held_out == World().held_out
    codes = {concept.code: i for i, concept in enumerate(world.concepts)}
    assert "ko" in world.concepts[codes[cake]].names
    korean = {row.concept for row in EmojiSource(world, "ko", held_out="all").rows}
    assert set(range(640)) - korean == {codes[lantern], codes[dragon]}
    both = [row for row in EmojiSource(world, ("ko", "zh"), held_out="all").rows if row.concept not in korean]
    assert {row.concept for row in both} == {codes[lantern], codes[dragon]}
    assert {row.language for row in both} == {"zh"}


@pytest.mark.parametrize("language", ["xx", (), ("zh", "xx"), ("zh", "zh")])
def test_languages_that_are_not_known_are_refused(world, language):
    with pytest.raises(UserError, match=r"allowed are one or several of zh, en, ja, ko"):
        EmojiSource(world, language)
    with pytest.raises(ValueError, match=r"give one or several of zh, en, ja, ko"):
        EmojiConfig(kind="emoji", language=language)
    assert EmojiConfig(kind="emoji", language=["zh", "ko"]).language == ("zh", "ko")


def test_captions_follow_one_grammar(world):
    lantern = next(i for i, c in enumerate(world.concepts) if c.names["zh"] == "红灯笼")
    assert world.caption(lantern, "blue", "zh") == "红灯笼，蓝色背景"
    assert world.caption(lantern, "blue", "en") == "red paper lantern, blue background"
    assert world.caption(lantern, None, "zh") == "红灯笼"
    assert world.caption(lantern, "red", "ja").endswith("、赤の背景")
    assert world.caption(lantern, "blue", "de") == "rote papierlaterne, blauer Hintergrund"
    assert world.caption(None, "white", "ar") == "خلفية بيضاء"
    assert world.caption(None, "pink", "id") == "latar belakang merah muda"
    assert GRAMMAR.keys() == set(LANGUAGES)
    assert all(words.keys() == set(LANGUAGES) for _, words in COLOURS.values())
    assert world.caption(None, "blue", "zh") == "蓝色背景"
    assert world.caption(None, "blue", "en") == "blue background"


@pytest.mark.parametrize(("language", "background"), [("zh", "背景"), ("en", "background"), ("ja", "背景")])
def test_each_pair_is_named_by_concept_by_background_and_by_both(world, language, background):
    source = EmojiSource(world, language, limit=3)
    for row in source.rows:
        name = world.concepts[row.concept].names[language]
        assert (name in row.caption, background in row.caption) == (row.names_concept, row.names_colour)
    named = [(row.names_concept, row.names_colour) for row in source.rows[:5]]
    assert named == [(True, False), (True, True), (True, True), (True, True), (False, True)]


def test_what_else_is_known_of_a_picture_in_english(world):
    """Concepts that the worlds draw alike have the whole caption; the background is known of all."""
    source = EmojiSource(world, "zh")
    groups = {"native": None, "different": None, "shared": None}
    for i, row in enumerate(source.rows):
        groups[world.concepts[row.concept].group] = groups[world.concepts[row.concept].group] or i
    for group, first in groups.items():
        alone, named, background = (
            source[first // 5 * 5],
            source[first // 5 * 5 + 1],
            source[first // 5 * 5 + 4],
        )
        row = source.rows[first // 5 * 5]
        assert (alone.english is not None) == (named.english is not None) == (group == "shared")
        assert background.english == f"{row.colour} background"
        assert named.bilingual == (alone.caption, f"{row.colour} background")
        assert background.bilingual is None
    assert EmojiSource(world, "en", limit=2)[0].english is None


def test_the_english_side_never_sees_native_concepts_nor_openmoji(world):
    source = EmojiSource(world, language="en", groups=("different", "shared"))
    assert {row.look for row in source.rows} == {"twemoji"}
    native = {i for i, c in enumerate(world.concepts) if c.group == "native"}
    assert not native & {row.concept for row in source.rows}
    chinese = EmojiSource(world, language="zh")
    looks = {(world.concepts[r.concept].group, r.look) for r in chinese.rows}
    assert looks == {("native", "twemoji"), ("shared", "twemoji"), ("different", "openmoji")}


def test_held_out_pairs_are_in_no_training_source(world):
    for source in (
        EmojiSource(world, "zh"),
        EmojiSource(world, "en"),
        EmojiSource(world, looks=("twemoji", "openmoji")),
    ):
        assert not {(r.concept, r.colour) for r in source.rows} & world.held_out
    validation = EmojiSource(world, "zh").validation
    assert {(r.concept, r.colour) for r in validation.rows} == world.held_out
    assert all("背景" in r.caption and r.names_concept for r in validation.rows)


def test_validation_has_the_colours_and_captions_of_training(world):
    validation = EmojiSource(world, "en", colours=("purple",), name_colours=False).validation
    assert {(r.concept, r.colour) for r in validation.rows} == {
        pair for pair in world.held_out if pair[1] == "purple"
    }
    assert not any("background" in r.caption for r in validation.rows)


def test_a_limit_spreads_evenly(world):
    for limit in (1, 3, 64, 400, 640, 1000):
        kept = sorted({r.concept for r in EmojiSource(world, limit=limit, held_out="all").rows})
        assert len(kept) == min(limit, 640)
        gaps = np.diff([*kept, 640 + kept[0]])
        assert gaps.max() - gaps.min() <= 1


def test_colours_of_the_configuration_are_the_worlds():
    assert get_args(Colour) == COLOUR_NAMES
    assert get_args(Treatment) == TREATMENTS
    assert get_args(Language) == LANGUAGES


def test_a_fixed_batch_sees_every_kind_of_row(world):
    """Rows come in a rhythm of treatments and variants, which an even spacing may fall in with."""
    source = EmojiSource(world, looks=("twemoji", "openmoji"), treatments=TREATMENTS, variants=3)
    rows = [source.rows[i] for i in fixed_batch(source, 400, seed=0).indices]
    assert {row.treatment for row in rows} == set(TREATMENTS)
    assert {row.variant for row in rows} == {0, 1, 2}
    assert {row.look for row in rows} == {"twemoji", "openmoji"}
    few = EmojiSource(world, limit=1)
    assert sorted(fixed_batch(few, 10_000, seed=0).indices) == [*range(len(few))]


def test_no_validation_examples_are_an_error(world):
    lacking = next(i for i in range(640) if i not in {concept for concept, _ in world.held_out})
    source = EmojiSource(world, limit=1)
    source.rows = [row for row in source.rows if row.concept == lacking]
    with pytest.raises(UserError, match="no validation examples"):
        fixed_batch(source, 4, seed=0)


def test_pictures_have_their_background_and_are_reproducible(world):
    source = EmojiSource(world, size=32)
    for i in range(0, len(source), 1999):
        example, row = source[i], source.rows[i]
        assert torch.equal(source[i].pixels, example.pixels)
        assert example.pixels.shape == (3, 32, 32)
        assert tuple(example.pixels[:, 0, 0].tolist()) == COLOURS[row.colour][0]
        assert example.caption == row.caption
    pictures = {source[i].pixels.numpy().tobytes() for i, r in enumerate(source.rows[:32])}
    assert len(pictures) > 24, "variants differ, but for shifts that fall on the same pixels"


def test_treatments_change_what_they_say_and_nothing_else(world):
    """The rows of one picture differ in its treatment alone.

    Outlines darken its contour, a shadow what is below and right of it, a seal is red and in one corner, a
    frame at the rim, dots are white and beside the drawing.
    """
    source = EmojiSource(world, "en", looks=("twemoji", "openmoji"), treatments=TREATMENTS, limit=4)
    found = {(r.concept, r.colour, r.variant, r.look, r.treatment): i for i, r in enumerate(source.rows)}
    assert not any("outlined" in r.treatment and r.look == "openmoji" for r in source.rows)
    assert not any("sealed" in r.treatment and r.colour == "red" for r in source.rows)
    assert not any("dotted" in r.treatment and r.colour == "white" for r in source.rows)
    first = source.rows[-1].concept
    drawn = {
        treatment: source[found[first, "blue", 1, "twemoji", treatment]].pixels.int()
        for treatment in TREATMENTS
    }
    plain = drawn["plain"]
    changed = {name: (pixels != plain).any(0) for name, pixels in drawn.items()}
    background = (plain == torch.tensor(COLOURS["blue"][0]).view(3, 1, 1)).all(0)

    grey = drawn["grey"][:, ~background]
    assert (drawn["grey"][:, changed["grey"]].float().std(0)).mean() < 1 + plain[:, ~background].float().std(
        0
    ).mean()
    assert grey.shape[1] > 100
    assert drawn["outlined"].sum() < plain.sum()
    assert drawn["outlined"].amin(0).sum() < plain.amin(0).sum(), "a black line"
    assert drawn["shadowed"].sum() < plain.sum()
    assert not changed["sealed"][:48].any()
    assert not changed["sealed"][:, :48].any()
    seal = drawn["sealed"][:, changed["sealed"]].unique(dim=1).T.tolist()
    assert sorted(seal) == sorted([list(COLOURS["red"][0]), [255, 255, 255]])
    rim = torch.ones(64, 64, dtype=torch.bool)
    rim[3:-3, 3:-3] = False
    assert torch.equal(changed["framed"], rim)
    assert changed["dotted"].sum() > 100
    assert (drawn["dotted"][:, changed["dotted"] & background] == 255).all()
    both, sealed = drawn["outlined_sealed"], changed["sealed"]
    assert torch.equal(both[:, ~sealed], drawn["outlined"][:, ~sealed])
    assert torch.equal(both[:, sealed], drawn["sealed"][:, sealed])


def test_mirrored_pictures_are_drawn_in_their_share(world):
    plain, mirrored = (EmojiSource(world, limit=2, flip=flip) for flip in (0.0, 1.0))
    batches = [make_batch([(0, 5, source[5])], seed=0) for source in (plain, mirrored)]
    assert torch.equal(batches[1].pixels, batches[0].pixels.flip(-1))
    assert not torch.equal(batches[1].pixels, batches[0].pixels)


def test_colours_are_far_apart():
    rgb = np.array([COLOURS[c][0] for c in COLOUR_NAMES], dtype=float)
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e9 * np.eye(len(rgb))
    assert distances.min() > 60


def test_too_many_concepts_is_an_error():
    with pytest.raises(UserError, match="5000 asked for"):
        World(5000)


def test_pixels_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit_range(pixels)), pixels)


def test_the_stream_is_a_pure_function_of_position():
    whole = draw_indices(0, 25, [10], seed=3)
    assert [draw_indices(p, 1, [10], seed=3)[0] for p in range(25)] == whole
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]


def test_processes_share_a_batch_and_noise_belongs_to_the_sample(world):
    source = EmojiSource(world, limit=4)
    one = next(stream(source, 5, 6, 8, seed=1))
    two = [next(stream(source, 5, 6, 8, seed=1, process=r, processes=2, workers=0)) for r in range(2)]
    assert one.captions == two[0].captions + two[1].captions
    assert torch.equal(one.randn(3), torch.cat([b.randn(3) for b in two]))
    batch = fixed_batch(source, 4, seed=0)
    assert torch.equal(batch.pixels, fixed_batch(source, 4, seed=0).pixels)
    assert len(make_batch([(0, 0, source[0])], 0)) == 1
