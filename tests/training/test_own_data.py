"""A run looks at itself on its own texts, and keeps the state that was best."""

import pytest
import torch
from linear_run import LinearRecipe, Stop, run

from bdm.config import EvaluationConfig
from bdm.errors import UserError
from bdm.training import own_data
from bdm.training.metrics import read_metrics
from bdm.training.states import load_state, state_files


class Drawing(LinearRecipe):
    """Draws grey pictures, and remembers what it was told."""

    def __init__(self, stop=10**9):
        super().__init__()
        self.told, self.stop, self.calls = [], stop, 0

    def forward(self, batch):
        self.calls += self.training
        if self.calls > self.stop:
            raise Stop
        return super().forward(batch)

    def draw(self, prompts, guidance, seed):
        self.told.append((tuple(prompts), guidance, seed))
        return torch.zeros(len(prompts), 3, 8, 8)


@pytest.fixture
def scores(monkeypatch):
    """A scorer that says of the n-th look what stands here at n."""
    said = {}

    class Fixed:
        def __init__(self, scorer, features, device):
            assert scorer == "clip"

        def __call__(self, drawn, texts, real):
            assert drawn.dtype == torch.uint8
            said["looks"] = said.get("looks", 0) + 1
            return {"clip_score": said["values"][said["looks"] - 1]}

    monkeypatch.setattr(own_data, "PictureScores", Fixed)
    return said


EVALUATION = dict(every=2, prompts=["龙", "月饼"], scorer="clip", best="clip_score", guidance=3.0)
RARE = dict(validate_every=100, grid_every=100, checkpoint_every=5, keep_last=1)


def steps_of(out):
    return sorted(int(path.stem.removeprefix("step-")) for path in state_files(out / "states"))


def test_the_best_state_is_kept(tmp_path, scores):
    scores["values"] = [0.1, 0.4, 0.2, 0.3, 0.35, 0.1]
    recipe = Drawing()
    run(tmp_path, recipe, evaluation=EVALUATION, **RARE)
    rows = {row["step"]: row["own/clip_score"] for row in read_metrics(tmp_path) if "own/clip_score" in row}
    assert rows == dict(zip((2, 4, 6, 8, 10, 12), scores["values"], strict=True))
    assert steps_of(tmp_path) == [4, 12]
    best = {"figure": "clip_score", "step": 4, "value": 0.4}
    assert load_state(tmp_path / "states")["best"] == best
    assert set(recipe.told) == {(("龙", "月饼"), 3.0, 0)}, "always the same texts and noise"
    assert len(list((tmp_path / "grids").glob("own-*.png"))) == 6


def test_a_run_that_goes_on_remembers_its_best(tmp_path, scores):
    scores["values"] = [0.1, 0.4, 0.2, 0.3, 0.35, 0.1]
    with pytest.raises(Stop):
        run(tmp_path, Drawing(stop=7), evaluation=EVALUATION, **RARE)
    scores["looks"] = 2  # it goes on from step 5, behind the second look
    run(tmp_path, Drawing(), evaluation=EVALUATION, **RARE)
    assert steps_of(tmp_path) == [4, 12]


def test_smaller_distances_are_better():
    figures = EvaluationConfig(features="x", best="fid")
    own = object.__new__(own_data.OwnData)
    own._config = figures
    best = own.better({"own/fid": 20.0}, None, 1)
    assert own.better({"own/fid": 30.0}, best, 2) == best
    assert own.better({"own/fid": 10.0}, best, 3)["step"] == 3
    assert own.better({}, best, 4) == best
    assert own.better({"own/fid": float("nan")}, best, 5) == best


def test_what_cannot_be_looked_at_is_refused_before_the_first_step(tmp_path, scores):
    with pytest.raises(ValueError, match="give scorer"):
        EvaluationConfig()
    with pytest.raises(ValueError, match="best is fid, which nothing measures; give features"):
        EvaluationConfig(scorer="clip", best="fid")
    with pytest.raises(UserError):
        run(tmp_path, Drawing(), evaluation=EVALUATION | {"prompts": str(tmp_path / "none.txt")}, **RARE)
    with pytest.raises(UserError, match="draws nothing from texts"):
        run(tmp_path, LinearRecipe(), evaluation=EVALUATION, **RARE)
    assert not (tmp_path / "states").exists()
