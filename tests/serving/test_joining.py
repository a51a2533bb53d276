"""Which requests are drawn alone."""

import pytest

from bdm.drawing.request import KINDS, FileRef, PluginUse, Request
from bdm.serving.joining import why_alone


def plugged(kind, prompt="龙"):
    use = PluginUse(kind=kind, file=FileRef("one.safetensors"), name="one", text_strength=1.0)
    return Request(prompt=prompt, plugins=[use])


@pytest.mark.parametrize("kind", KINDS)
def test_what_acts_inside_the_calls_is_drawn_alone(kind):
    inside = kind == "ip_adapter"
    assert (kind in why_alone(plugged(kind))) == inside
    assert bool(why_alone(plugged(kind))) == inside


def test_a_prompt_that_sets_another_strength_is_drawn_alone():
    assert why_alone(plugged("adapter", "龙 <lora:one:0.5>"))
    assert not why_alone(plugged("adapter", "龙 <lora:one:1>"))
