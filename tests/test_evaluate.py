import torch

from bdm.data.emoji import COLOUR_NAMES, World
from bdm.evaluate.judge import JudgeModel, Verdict, augment
from bdm.evaluate.trials import draw, make_trials, score, sweep_trial


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def test_augmentation_belongs_to_the_picture_and_keeps_a_plain_background():
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    whole = augment(pictures, generators(3))
    torch.testing.assert_close(augment(pictures[1:2], generators(3)[1:2]), whole[1:2])
    assert (whole - pictures).abs().mean() > 0.02
    plain = torch.full((1, 3, 32, 32), 0.5)
    changed = augment(plain, generators(1))
    assert (changed - changed.mean()).abs().mean() < 0.1, "only noise on a plain picture"


def test_judge_saves_and_loads(tmp_path):
    judge = JudgeModel(concepts=5, colours=8, width=8).eval()
    judge.save_pretrained(tmp_path)
    pictures = torch.rand(2, 3, 32, 32)
    loaded = JudgeModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pictures).concept, judge(pictures).concept, atol=2e-3, rtol=1e-2)
    assert loaded(torch.rand(2, 3, 64, 64)).colour.shape == (2, 8)


class FixedJudge:
    """A judge that says what it is told."""

    def __init__(self, concepts, colours, looks):
        sizes = (640, len(COLOUR_NAMES), 2, 2)
        said = (concepts, colours, looks, [0] * len(looks))
        self.verdict = Verdict(*(torch.nn.functional.one_hot(torch.tensor(v), n).float() for v, n in zip(said, sizes)))

    def __call__(self, pictures):
        return self.verdict


def test_trials_cover_the_world_and_scores_are_shares():
    world = World()
    trials = {t.name: t for t in make_trials(world, controls=8, seed=0)}
    assert trials["chinese"].concepts == list(range(640))
    assert set(zip(trials["held_out"].concepts, trials["held_out"].colours)) == world.held_out
    seen = set(zip(trials["trained_pairs"].concepts, trials["trained_pairs"].colours))
    sweep = sweep_trial(world, 64, seed=0)
    assert not (seen | set(zip(sweep.concepts, sweep.colours))) & world.held_out
    assert sorted(trials["trained_pairs"].concepts) == sorted(trials["held_out"].concepts)
    assert len(sweep.native) == 64
    assert all(world.concepts[i].group != "native" for i in trials["english"].concepts)
    assert not any(trials["english"].native)
    assert not any(trials["chinese"].english)
    assert trials["scale_0"].branch_scale == 0
    trial = trials["mixed"]
    right = [COLOUR_NAMES.index(c) for c in trial.colours]
    wrong_colour = [*right[:6], *((c + 1) % 8 for c in right[6:])]
    concepts = [*trial.concepts[:4], *((i + 1) % 640 for i in trial.concepts[4:])]
    result = score(FixedJudge(concepts, wrong_colour, [1] * 2 + [0] * 6), torch.zeros(8, 3, 32, 32), trial)
    assert (result.concept, result.colour, result.both, result.openmoji) == (0.5, 0.75, 0.5, 0.25)


def test_draw_gives_every_prompt_its_seed(pipe):
    world = World()
    trial = make_trials(world, controls=3, seed=0)[-1]
    whole = draw(pipe, trial, steps=2, guidance=2.0, batch=3, seed=5)
    parts = draw(pipe, trial, steps=2, guidance=2.0, batch=2, seed=5)
    assert whole.shape == (3, 3, 64, 64)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
