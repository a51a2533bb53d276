"""Branches beside a pipeline's own: several native languages, or text encoders, in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quoted
from ..method.branch import BranchModel
from ..method.clock import check_window
from ..method.condition import NativeCondition
from ..method.schedule import read_schedule
from ..plugins.kind import finite
from ..plugins.parameters import plain
from ..text.native import NativeTextEncoder
from ..text.pairs import TextPairs, encode_pairs, make_pairs
from ..text.rules import PromptRules
from ..text.script import read_script

#: What a call may say of a branch beside the pipeline's own, and what holds where it does not.
SETTINGS: dict[str, Any] = {
    "prompt": "", "negative_prompt": "", "scale": 1.0, "start": 0.0, "end": 1.0, "schedule": None
}  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """A branch with the text encoder that it was trained with."""

    branch: BranchModel
    native_text_encoder: NativeTextEncoder


@dataclass(frozen=True)
class Said:
    """What a voice is told in one call.

    Attributes:
        voice: whom.
        texts: P prompts with their negatives.
        window: scale, start, end and schedule of its residuals (see ``NativeCondition``).
        rules: how its prompts are read.
    """

    voice: Voice
    texts: TextPairs
    window: Mapping[str, Any]
    rules: PromptRules

    def lengths(self) -> list[int]:
        """Chunks of each prompt."""
        encoder = self.voice.native_text_encoder
        return self.texts.chunks(lambda text: encoder.chunks(text, self.rules))

    def condition(self, chosen: Sequence[int], pipe: Any, **call: Any) -> NativeCondition:
        """What the branch is told for some of the prompts.

        Args:
            chosen: which prompts.
            pipe: what draws; branch and encoder come to where it computes.
            call: further arguments of the condition.
        """
        branch, encoder = self.voice.branch, self.voice.native_text_encoder
        _bring(branch, pipe, pipe.unet.dtype)
        _bring(encoder, pipe)
        positive, negative = encode_pairs(
            self.texts.take(chosen), lambda texts: encoder(texts, self.rules), "negative_prompt"
        )
        return NativeCondition(positive, negative, **self.window, **call)


class BesideMixin:
    """A bilingual pipeline's further branches."""

    unet: Any

    @property
    def voices(self) -> dict[str, Voice]:
        """The branches beside the pipeline's own, by name; ``save_pretrained`` does not write them."""
        return self.__dict__.setdefault("_voices", {})

    def add_branch(self, name: str, branch: BranchModel, native_text_encoder: NativeTextEncoder) -> None:
        """Put a further branch beside the pipeline's own.

        Both act on the same backbone and add their residuals; a call tells each its own prompt:
        ``pipe("红灯笼", beside={"world": "a red lantern"})``. One that a call says nothing to is silent.
        Drawing moves it to where the pipeline computes, and there it stays: a pipeline's offloading knows its
        own parts alone.

        Args:
            name: what calls name it by.
            branch: of the backbone's size.
            native_text_encoder: the one that it was trained with.

        Raises:
            UserError: the name is taken, or branch, encoder and backbone do not fit.
        """
        from .parts import check_parts

        for part, kind in ((branch, BranchModel), (native_text_encoder, NativeTextEncoder)):
            if not isinstance(plain(part), kind):
                raise UserError(f"branch {name!r}: a {type(part).__name__} is no {kind.__name__}; give one")
        if not isinstance(name, str) or not name or name in self.voices:
            raise UserError(
                f"a branch cannot be called {name!r}; give a text that none of these is called by:"
                f" {', '.join(self.voices) or 'none yet'}"
            )
        check_parts(self.unet, branch, native_text_encoder)
        self.voices[name] = Voice(branch, native_text_encoder)

    def remove_branch(self, name: str) -> None:
        """Take a further branch away.

        Raises:
            UserError: there is none of that name.
        """
        self._voice(name)
        del self.voices[name]

    def _voice(self, name: str) -> Voice:
        if name not in self.voices:
            raise UserError(
                f"no branch is called {name!r}; beside the pipeline's own there are:"
                f" {', '.join(self.voices) or 'none (see add_branch)'}"
            )
        return self.voices[name]

    def _said_beside(self, beside: Any, count: int, rules: PromptRules) -> list[Said]:
        """What a call says to the branches beside its own.

        Raises:
            UserError: no such branch, settings that are not known, numbers that do not fit.
        """
        if beside is None:
            return []
        if not isinstance(beside, Mapping):
            raise UserError(f"beside is {beside!r}; give prompts by the names of branches")
        return [self._said(name, told, count, rules) for name, told in beside.items()]

    def _said(self, name: str, told: Any, count: int, rules: PromptRules) -> Said:
        voice = self._voice(name)
        settings = dict(told) if isinstance(told, Mapping) else {"prompt": told}
        unknown = [key for key in settings if key not in SETTINGS]
        if unknown:
            raise UserError(
                f"beside {name!r}: {unknown[0]!r} is not known; allowed are {', '.join(SETTINGS)}"
            )
        settings = SETTINGS | settings
        window: dict[str, Any] = {
            key: finite(settings[key], f"{name} {key}") for key in ("scale", "start", "end")
        }
        check_window(window["start"], window["end"], name)
        window["schedule"] = read_schedule(settings["schedule"])
        texts = make_pairs(
            None, settings["prompt"], None, settings["negative_prompt"], count, f"{name} prompt",
            f"{name} negative_prompt",
        )  # fmt: skip
        for side in (texts.positive, texts.negative):
            assert isinstance(side, list)
            for text in side:
                _refuse_steps(name, text, rules)
        return Said(voice, texts, window, rules)


def _refuse_steps(name: str, text: str, rules: PromptRules) -> None:
    """Refuse a prompt that changes from step to step, joins others or names adapters.

    Raises:
        UserError: names it.
    """
    script = read_script(text, 1000, rules, native=True)
    if len(script.ends) > 1 or script.weights != (1.0,) or script.loras:
        raise UserError(
            f"beside {name!r}: {quoted(text)} schedules words, joins prompts or names an adapter, which the"
            " pipeline's own prompts alone can; write it without"
        )


def _bring(module: nn.Module, pipe: Any, dtype: torch.dtype | None = None) -> None:
    """Move a module to where a pipeline computes, which may have been moved.

    The pipeline's own parts, and what is offloaded, are put in place by others.
    """
    if hasattr(module, "_hf_hook") or any(module is part for part in pipe.components.values()):
        return
    # nn.Module's own: ModelMixin's warns about float32 modules even where there are none.
    nn.Module.to(module, pipe._execution_device, dtype)


def branches_of(said: Sequence[Said]) -> Iterator[BranchModel]:
    """The branches that are told something."""
    return (each.voice.branch for each in said)
