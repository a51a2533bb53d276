"""What a run reports of itself."""

import json

import pytest
from linear_run import LinearRecipe, Stop, StoppingRecipe, run

from bdm.training.metrics import read_metrics
from bdm.training.plots import plot_metrics


def test_a_resume_between_two_log_rows_logs_a_mean(tmp_path):
    """The checkpoint at step 8 lies inside the row of steps 7 to 12, so the resumed row is the mean of steps
    9 to 12.
    """
    run(tmp_path / "every", log_every=1)
    with pytest.raises(Stop):
        run(tmp_path / "cut", StoppingRecipe(), log_every=6)
    run(tmp_path / "cut", log_every=6)
    single = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "every") if "loss" in row}
    rows = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "cut") if "loss" in row}
    assert rows[12] == pytest.approx(sum(single[i] for i in (9, 10, 11, 12)) / 4, rel=1e-4)


def test_half_a_line_of_metrics_does_not_stop_a_run(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, StoppingRecipe())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(("losses", "scale"), [((2.0, 0.5), "log"), ((2.0, -0.5), "linear")])
def test_losses_below_zero_are_shown(tmp_path, monkeypatch, losses, scale):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    plot_metrics(tmp_path)
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    assert axes.lines[0].get_ydata().tolist() == list(losses)


def test_metrics_and_grids_go_to_the_trackers(tmp_path):
    """TensorBoard's own reader finds the rows of metrics.jsonl, the settings and the grid."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Drawing(LinearRecipe):
        def grid(self):
            return Image.new("RGB", (6, 4), "red")

    run(tmp_path, Drawing(), trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "trackers/bdm"))
    events.Reload()
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    found = events.Scalars("loss")
    assert [event.step for event in found] == [row["step"] for row in rows]
    assert [event.value for event in found] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert [(event.step, event.width, event.height) for event in events.Images("grid")] == [
        (4, 6, 4),
        (8, 6, 4),
        (12, 6, 4),
    ]
    settings = next((tmp_path / "trackers/bdm").rglob("hparams.yml")).read_text()
    assert "optimizer.steps: 12" in settings


def test_a_run_that_goes_on_is_one_run_for_its_trackers(tmp_path):
    """What they had of steps that are done again is taken back; its name stays."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stop):
        run(tmp_path, StoppingRecipe(), trackers=("tensorboard",), log_every=1)
    name = (tmp_path / "trackers/id").read_text()
    run(tmp_path, trackers=("tensorboard",), log_every=1)
    assert (tmp_path / "trackers/id").read_text() == name
    assert len(name) == 21
    events = EventAccumulator(str(tmp_path / "trackers/bdm"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
