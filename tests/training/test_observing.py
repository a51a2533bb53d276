"""What is seen of a run's steps, and that they are what they were."""

import json
import time

import pytest
import torch
from linear_run import LinearRecipe, run
from torch import nn

from bdm.parallel.processes import Share
from bdm.training.metrics import RunningMeans, read_metrics
from bdm.training.observing import GradientNorms, Observer, PhaseClock, Utilisation, measured_rate
from bdm.training.recipes.terms import by_timestep


class One:
    """What joins processes where there is one."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")

    def reduce(self, tensor, how):
        return tensor


def test_every_row_says_where_the_time_went(tmp_path):
    class Slow(LinearRecipe):
        def forward(self, batch):
            time.sleep(0.02)
            return super().forward(batch)

    run(tmp_path, Slow(), optimizer=dict(steps=4, warmup_steps=0), log_every=2, checkpoint_every=4)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        phases = {name: value for name, value in row.items() if name.startswith("seconds/")}
        assert {"seconds/data", "seconds/forward", "seconds/backward", "seconds/weights"} <= set(phases)
        assert row["seconds/forward"] >= 0.04
        assert sum(phases.values()) <= row["seconds"] * 1.01
        # One part, whose norm is the whole one's of the last step.
        assert row["grad_norm/layer"] > 0
    assert (tmp_path / "steps.png").is_file()


def test_norms_by_part_make_up_the_whole_one_whatever_the_scale():
    parts = {"a": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), "b": nn.Linear(4, 1)}
    parameters = [p for part in parts.values() for p in part.parameters()]
    for seed, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    plain = {
        "grad_norm/a.0": torch.cat([p.grad.flatten() for p in parts["a"][0].parameters()]).norm().item(),
        "grad_norm/a.1": torch.cat([p.grad.flatten() for p in parts["a"][1].parameters()]).norm().item(),
        "grad_norm/b": torch.cat([p.grad.flatten() for p in parts["b"].parameters()]).norm().item(),
    }
    norms = GradientNorms(parts)
    whole = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    norms.gradients(whole, due=True)
    assert norms.figures(1, 1.0) == pytest.approx(plain, rel=1e-5)
    norms.gradients(whole, due=False)
    assert norms.figures(1, 1.0) == {}
    for p in parameters:
        p.grad = None
    norms.gradients(torch.tensor(0.0), due=True)
    assert norms.figures(1, 1.0) == {}


def test_losses_by_timestep_are_the_means_of_their_samples():
    """Over steps of different samples, and over steps that have none in a bucket."""
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.rand(6, generator=generator), t) for t in (torch.randint(0, 500, (6,)), torch.arange(6))]
    means = RunningMeans()
    for errors, t in steps:
        means.add({"loss": errors.mean(), **by_timestep(errors, t, 1000)})
    row = means.take(One())
    errors, t = (torch.cat(column) for column in zip(*steps, strict=True))
    assert row["loss/t0-250"] == pytest.approx(errors[t < 250].mean().item())
    if (t >= 250).any():
        assert row["loss/t250-500"] == pytest.approx(errors[(t >= 250) & (t < 500)].mean().item())
    assert "loss/t750-1000" not in row, "no sample, no figure"
    assert row["loss"] == pytest.approx(errors.mean().item())


class Fake(Share):
    """A share of so many processes, without any."""

    def __init__(self, number, processes):
        object.__setattr__(
            self, "accelerator", type("A", (), dict(num_processes=processes, process_index=number))
        )


@pytest.mark.parametrize(("count", "processes"), [(64, 3), (5, 8), (7, 7), (1, 2), (10, 4)])
def test_shares_cover_everything_once_and_none_is_idle(count, processes):
    shares = [Fake(i, processes) for i in range(processes)]
    parts = [share.part(count) for share in shares]
    assert all(len(part) for part in parts)
    counted_places = [i for share, part in zip(shares, parts, strict=True) for i in part if share.own(count)]
    assert counted_places == list(range(count))
    assert [share.own(count) for share in shares] == [
        len(part) if share.own(count) else 0 for share, part in zip(shares, parts, strict=True)
    ]


def test_a_shared_mean_is_that_of_one_process():
    """A process that only repeats the last sample counts nothing."""
    values = torch.rand(10)
    shares, told = [Fake(i, 4) for i in range(4)], []
    for share in shares:
        own = values[list(share.part(10))]
        told.append((own.sum() if share.own(10) else torch.tensor(0.0), float(share.own(10))))
    total, count = (sum(column) for column in zip(*told, strict=True))
    for share, one in zip(shares, told, strict=True):
        share.accelerator.device = torch.device("cpu")
        share.accelerator.reduce = lambda own, how: torch.tensor([float(total), count])
        assert share.mean(*one) == pytest.approx(values.mean().item())
    assert count == 10
    assert Share().mean(values.sum(), 10) == pytest.approx(values.mean().item())


def test_utilisation_is_what_was_done_of_what_could_be():
    assert Utilisation(2e9, 8, 1e12).figures(10, 2.0)["flop_utilisation"] == pytest.approx(0.08)
    assert measured_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e6


def test_a_window_of_steps_is_profiled(tmp_path):
    run(
        tmp_path,
        optimizer=dict(steps=6, warmup_steps=0),
        profile=dict(first=2, steps=2),
        validate_every=100,
        grid_every=100,
    )
    trace = tmp_path / "profile/step-00000003-00000004.json"
    assert json.loads(trace.read_text())["traceEvents"]
    assert "aten::" in trace.with_suffix(".txt").read_text()


def test_who_looks_on_costs_next_to_nothing():
    """A step's marks take less than a thousandth of a step of 100 ms."""
    clock = PhaseClock(One())
    start = time.thread_time()
    for _ in range(200):
        for name in ("data", "forward", "backward", "weights", "evaluation"):
            with clock.phase(name):
                pass
    assert (time.thread_time() - start) / 200 < 1e-4
    assert Observer().figures(1, 1.0) == {}
