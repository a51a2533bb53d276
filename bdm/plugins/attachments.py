"""What hangs on a pipeline: deltas on its weights, ControlNets on its UNet."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from ..errors import UserError
from ..formats.checkpoint import Parts, check_weights, named_like
from ..formats.configs import part_config
from ..formats.noise import SD15_NOISE, Noise
from ..formats.settings import refuse_other_settings
from ..models.samplers import scheduler_noise
from .controlnet_hook import ControlNetHook
from .parameters import plain
from .stack import Place, WeightStack
from .words import TriggerWords

logger = logging.getLogger("bdm")

#: Who has asked for a module. Two that put deltas on it would each take the other's for the base.
_SHARED: WeakKeyDictionary[nn.Module, WeakSet[Attachments]] = WeakKeyDictionary()


class Attachments:
    """What hangs on a pipeline, or on a bare ``Backbone``.

    Args:
        pipe: has ``unet``, ``vae``, ``text_encoder`` and ``tokenizer`` as attributes, or some of them.

    Attributes:
        pipe: the same.
        weights: its weights with deltas on them.
        words: the trigger words among them.
        controlnets: the hooks of the ControlNets by name.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.weights = WeightStack(self.part)
        self.words = TriggerWords(pipe, self.weights)
        self.controlnets: dict[str, ControlNetHook] = {}
        self._hung: dict[str, ExitStack] = {}
        self._modules: dict[str, nn.Module] = {}
        weakref.finalize(self, _take_off_all, self._hung).atexit = False

    def has(self, part: str) -> bool:
        """Whether the pipeline has a part."""
        return getattr(self.pipe, part, None) is not None

    @property
    def without_english(self) -> bool:
        """Whether nothing reads English: native text is in its place, and no English encoder beside it.

        Text parts of plug-ins, which are made for that encoder, have nothing to act on then. A pipeline with
        a branch reads English whatever it was loaded with.
        """
        by_text = self.has("native_text_encoder") and getattr(self.pipe, "branch", self) is None
        return by_text and not self.has("text_encoder")

    @property
    def moved_unet(self) -> str:
        """Why the UNet is not SD1.5's any more; "" where it is, as far as anybody has said."""
        return str(getattr(self.pipe, "moved_unet", None) or "")

    def leave_out(self, what: str, path: Path) -> None:
        """Say what of a file is left out, because it acts on English CLIP's text encoder alone.

        Args:
            what: with its number, such as "72 text weights".
            path: of the file.
        """
        logger.warning(
            "%s: %s left out, because the pipeline has no English text encoder to act on; give one"
            " (text_encoder=, tokenizer=) to have them",
            path,
            what,
        )

    @property
    def noise(self) -> Noise:
        """What the pipeline's scheduler takes its denoiser for; SD1.5's kind where there is none."""
        scheduler = getattr(self.pipe, "scheduler", None)
        return SD15_NOISE if scheduler is None else scheduler_noise(scheduler)

    def part(self, part: str) -> nn.Module:
        """A part of the pipeline that something is to hang on, without ``torch.compile``'s wrapping.

        Raises:
            UserError: there is none; it was exchanged; plug-ins of another pipeline are on it.
        """
        if not self.has(part):
            raise UserError(f"the pipeline has no {part.replace('_', ' ')} that this plug-in could change")
        module = plain(getattr(self.pipe, part))
        known = self._modules.get(part)
        if known is not None and known is not module and self.changes(known):
            raise UserError(
                f"the pipeline's {part} was exchanged while plug-ins were on it; put the old one back,"
                " detach, then exchange"
            )
        refuse_shared(module, self, part)
        self._modules[part] = module
        _SHARED.setdefault(module, WeakSet()).add(self)
        return module

    def changes(self, module: nn.Module) -> bool:
        """Whether an attached plug-in is on this module."""
        return any(self._modules.get(part) is module for part in self._changed())

    def check(self) -> None:
        """Refuse to draw where plug-ins would not act.

        Raises:
            UserError: a part that plug-ins are on was exchanged.
        """
        for part in self._changed():
            self.part(part)

    def _changed(self) -> set[str]:
        parts = {part for delta in self.weights.deltas.values() for part, _ in delta.places()}
        return parts | ({"unet"} if self.controlnets else set())

    def hang(self, name: str, hook: ControlNetHook) -> None:
        """Hang a ControlNet on the UNet.

        Raises:
            UserError: it does not fit.
        """
        stack = self._hung[name] = ExitStack()
        hook.attach(stack, self.part("unet"))
        self.controlnets[name] = hook

    def take_off(self, name: str) -> None:
        """Take a ControlNet off the UNet that it hangs on; nothing happens if there is none of that name."""
        self.controlnets.pop(name, None)
        if name in self._hung:
            self._hung[name].close()
            del self._hung[name]

    def replacement(self, part: str, parts: Parts, path: Path) -> dict[Place, Tensor]:
        """Weights that are to take the place of a part's.

        Raises:
            UserError: they are not exactly the weights of that part, are noted with other settings than its
                own, or some of it cannot be replaced.
        """
        self.weights.check(part)
        own = self.weights.base(part)
        weights = named_like(own, parts.weights[part])
        check_weights(own, weights, f"{path} ({part})")
        self._refuse_other_settings(part, parts, path)
        return {(part, key): tensor for key, tensor in weights.items()}

    def _refuse_other_settings(self, part: str, parts: Parts, path: Path) -> None:
        """Refuse weights whose file notes settings that the live network does not compute with.

        A file that notes nothing is taken for what the network is.
        """
        noted, live = parts.configs.get(part), getattr(self.part(part), "config", None)
        if not noted or live is None:
            return
        try:
            theirs = part_config(part, parts.weights[part], noted)
        except UserError as error:
            raise UserError(f"{path}: its {part.replace('_', ' ')}: {error}") from None
        ours = live if isinstance(live, Mapping) else live.to_dict()
        refuse_other_settings(part, theirs, ours, path)


def refuse_shared(module: nn.Module, ours: Attachments, part: str) -> None:
    """Refuse a module that plug-ins of another pipeline are on.

    Raises:
        UserError: they must be detached first.
    """

    def taken() -> bool:
        return any(other is not ours and other.changes(module) for other in _SHARED.get(module, ()))

    if taken():
        gc.collect()  # a pipeline that nobody holds any more stays until then
    if taken():
        raise UserError(
            f"another pipeline that shares this {part.replace('_', ' ')} has plug-ins on it; attach there, or"
            " detach those first"
        )


def _take_off_all(hung: dict[str, ExitStack]) -> None:
    """Take off the hooks of a pipeline that nobody holds any more."""
    for stack in hung.values():
        stack.close()
