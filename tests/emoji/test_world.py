from typing import get_args

import numpy as np
import pytest
import torch

from bdm.config.data import Colour, Treatment
from bdm.data.batch import fixed_batch, make_batch, stream
from bdm.data.order import draw_indices
from bdm.data.source import to_pixels, to_unit_range
from bdm.emoji.world import COLOUR_NAMES, COLOURS, TREATMENTS, EmojiSource, World
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


@pytest.mark.parametrize("language", ["zh", "en", "ja"])
def test_a_caption_means_one_concept(world, language):
    names = [c.names[language] for c in world.concepts]
    assert len(set(names)) == len(names)


def test_captions_follow_one_grammar(world):
    lantern = next(i for i, c in enumerate(world.concepts) if c.names["zh"] == "红灯笼")
    assert world.caption(lantern, "blue", "zh") == "红灯笼，蓝色背景"
    assert world.caption(lantern, "blue", "en") == "red paper lantern, blue background"
    assert world.caption(lantern, None, "zh") == "红灯笼"
    assert world.caption(lantern, "red", "ja").endswith("、赤の背景")
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
