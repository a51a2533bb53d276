"""A filter is measured where it is known which captions are wrong."""

import json

import numpy as np
import pytest

from bdm.config import FilterConfig
from bdm.data.prepared_table import ROW
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.evaluate.filtering import Filter, evaluate_filter, read_filter

DATA = {"kind": "emoji", "limit": 6, "size": 8, "wrong_captions": 0.3}


def scores_of(wrong):
    """Wrong ones are lower, on the whole."""
    return np.round(np.random.default_rng(0).normal(0.5 - 0.3 * wrong, 0.1), 4)


@pytest.fixture
def prepared(tmp_path):
    """A folder as ``bdm prepare`` leaves it, without the shards' tensors."""
    source = EmojiSource(World(), limit=6, size=8, wrong_captions=0.3)
    wrong = np.array([row.wrong for row in source.rows])
    rows = np.zeros(len(wrong), ROW)
    rows["score"] = np.round(scores_of(wrong) * 10_000)
    rows.tofile(tmp_path / "train.rows")
    about = {"names": np.array(["train-00000.tar"]), "sizes": [1], "counts": [len(rows)]}
    np.savez(tmp_path / "train.shards.npz", **about)
    said = {"data": DATA, "scorer": "clip", "min_score": None}
    (tmp_path / "prepared.json").write_text(json.dumps(said))
    return tmp_path


def test_wrong_captions_are_another_pictures_and_always_the_same():
    source, right = (EmojiSource(World(), limit=6, wrong_captions=share) for share in (0.3, 0.0))
    wrong = [i for i, row in enumerate(source.rows) if row.wrong]
    assert len(wrong) == round(0.3 * len(source.rows))
    for i, (row, true) in enumerate(zip(source.rows, right.rows, strict=True)):
        assert (row.concept, row.colour) == (true.concept, true.colour)
        assert (row.caption == true.caption) == (i not in wrong)
    again = EmojiSource(World(), limit=6, wrong_captions=0.3)
    assert [row.caption for row in again.rows] == [row.caption for row in source.rows]
    assert not any(row.wrong for row in source.validation.rows)
    assert source[wrong[0]].english is None
    with pytest.raises(UserError, match="one thing or have one background"):
        EmojiSource(World(), limit=1, wrong_captions=0.3)


def test_a_filter_is_counted_as_one_counts_by_hand(prepared):
    found, _ = read_filter(str(prepared))
    right, wrong = found.scores[~found.wrong], found.scores[found.wrong]
    pairs = (right[:, None] > wrong[None]).mean() + 0.5 * (right[:, None] == wrong[None]).mean()
    assert found.ranking == pytest.approx(pairs)
    passed = found.scores >= 0.4
    assert found.kept(0.4) == pytest.approx(((right >= 0.4).mean(), found.wrong[passed].mean()))
    chance = Filter(np.arange(1000) % 2 * 1.0, np.arange(1000) // 2 % 2 == 0)
    assert chance.ranking == pytest.approx(0.5)


def test_the_filter_is_told_in_figures_and_in_a_picture(prepared, tmp_path, capsys):
    result = evaluate_filter(FilterConfig(kind="filter", out=tmp_path / "out", prepared=str(prepared)))
    assert json.loads(capsys.readouterr().out) == result
    assert result["wrong"] == pytest.approx(0.3, abs=0.01)
    assert result["ranking"] > 0.9
    assert (tmp_path / "out/filter.png").exists()
    assert "have another" not in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"data": {"kind": "folder"}}, "without known wrong captions"),
        ({"data": DATA | {"wrong_captions": 0.0}}, "without known wrong captions"),
        ({"scorer": None}, "without a scorer, or with a threshold"),
        ({"min_score": 0.1}, "without a scorer, or with a threshold"),
        ({"data": DATA | {"limit": 7}}, "lacks samples or their scores"),
        (None, "holds no prepared shards"),
    ],
)
def test_what_cannot_be_measured_is_refused(prepared, tmp_path, said, message):
    path = prepared / "prepared.json"
    if said is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    config = FilterConfig(kind="filter", out=tmp_path / "out", prepared=str(prepared))
    with pytest.raises(UserError, match=message):
        evaluate_filter(config)
    assert not (tmp_path / "out").exists()
