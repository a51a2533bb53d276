"""What strengths, windows and names may be."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from bdm.errors import UserError

WRONG = [float("nan"), float("-inf"), 1e30, -1e30, 1e400, 10**5000, "0.8", None, 1j, [1.0], torch.tensor(1.0)]


def weights_of(pipe):
    parts = (pipe.unet, pipe.text_encoder)
    return [p.detach().clone() for part in parts for p in part.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["ink", "edges"])
def test_strengths_that_draw_nothing_are_refused(pipe, files, name):
    pipe.plugins.attach(files[name], strength=0.5)
    before, told = weights_of(pipe), dict(pipe.plugins[name].strength)
    control = torch.rand(1, 3, 64, 64) if name == "edges" else None
    wrong = [
        lambda strength: pipe.plugins.set_strength(name, strength),
        lambda strength: pipe.plugins.attach(files[name], "again", strength=strength),
        lambda strength: pipe("龙", control_images=control, plugin_strength={name: strength}),
    ]
    for strength in WRONG:
        for act in wrong:
            with pytest.raises(UserError, match=r"number|float32 can hold") as error:
                act(strength)
            assert "\n" not in str(error.value)
    assert same(weights_of(pipe), before)
    assert pipe.plugins[name].strength == told
    assert [plugin.name for plugin in pipe.plugins] == [name]


def test_numbers_of_any_kind_are_strengths(pipe, files):
    before = weights_of(pipe)
    for strength in (0, -1, 1e3, np.float32(0.5), np.int64(2), Fraction(1, 2)):
        pipe.plugins.attach(files["ink"], strength=strength)
        now = weights_of(pipe)
        pipe.plugins.set_strength("ink", float(strength))
        assert same(weights_of(pipe), now)
        pipe.plugins.detach("ink")
        assert same(weights_of(pipe), before)


@pytest.mark.parametrize(
    "window", [("a", 1.0), (0.0, None), (float("nan"), 1.0), (0.5, 0.2), (0.0, 1.1), (Decimal("0"), 1)]
)
def test_windows_are_shares_of_the_steps(pipe, files, window):
    with pytest.raises(UserError):
        pipe.plugins.attach(files["edges"], start=window[0], end=window[1])
    assert len(pipe.plugins) == 0
    assert not pipe.unet._forward_pre_hooks


def test_names_are_texts(pipe, files):
    with pytest.raises(UserError, match="cannot be called 5"):
        pipe.plugins.attach(files["ink"], 5)


@pytest.mark.parametrize("setting", ["path", "name_", "text_strength", "scale"])
def test_settings_that_a_kind_does_not_take(pipe, files, setting):
    with pytest.raises(UserError, match=f"takes no setting '{setting}'"):
        pipe.plugins.attach(files["edges"], **{setting: 1.0})


def test_a_pair_for_one_call_must_be_one(pipe, files):
    pipe.plugins.attach(files["ink"])
    for pair in ((1.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(UserError, match="give a number, or a pair"):
            pipe("龙", num_inference_steps=1, plugin_strength={"ink": pair})
    with pytest.raises(UserError, match="no plug-in is called"):
        pipe("龙", num_inference_steps=1, plugin_strength={"oil": 1.0})
    assert pipe.plugins["ink"].strength == {"unet": 1.0, "text_encoder": 1.0}
