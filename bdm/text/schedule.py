"""What a prompt says in each step: scheduled and alternating words, resolved."""

from __future__ import annotations

from .grammar import Alternation, Lora, Node, Part, Scheduled, walk
from .reader import read_prompt


def prompt_schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """The texts of a prompt over a drawing, as A1111's ``get_learned_conditioning_prompt_schedules``.

    A number below 1 is a share of the steps, any other a step.

    Args:
        text: a prompt without AND.
        steps: of the drawing.

    Returns:
        (last step, text) pairs, steps counted from 1.
    """
    (part,) = read_prompt(text, composed=False).parts
    return [(last, said_in(part.nodes, last, steps, loras=True)) for last in last_steps(part, steps)]


def composition(text: str, full_width: bool = False) -> list[tuple[str, float]]:
    """The prompts that AND joins, as they are written, each with its weight."""
    parts = read_prompt(text, full_width).parts
    return [(str(part).removesuffix(part.weight_text), part.weight) for part in parts]


def last_steps(part: Part, steps: int) -> list[int]:
    """The steps, from 1, behind which the words change, and the last one."""
    ends = {steps}
    for node in walk(part.nodes):
        if isinstance(node, Scheduled) and node.last_step(steps) >= 1:
            ends.add(node.last_step(steps))
        elif isinstance(node, Alternation):
            ends.update(range(1, steps + 1))
    return sorted(ends)


def said_in(nodes: tuple[Node, ...], step: int, steps: int, loras: bool = False) -> str:
    """What is said in a step (from 1) of so many.

    Args:
        nodes: of a prompt's part.
        step: the step.
        steps: how many there are.
        loras: keep ``<lora:...>``, which says nothing to a text encoder.
    """
    return "".join(_said(node, step, steps, loras) for node in nodes)


def _said(node: Node, step: int, steps: int, loras: bool) -> str:
    if isinstance(node, Scheduled):
        now = (node.before or ()) if step <= node.last_step(steps) else node.after
        return said_in(now, step, steps, loras)
    if isinstance(node, Alternation):
        return said_in(node.options[(step - 1) % len(node.options)], step, steps, loras)
    return "" if isinstance(node, Lora) and not loras else node.text
