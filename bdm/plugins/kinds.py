"""What each kind of plug-in does to a pipeline.

Files -> layers on its weights, ControlNet hooks and trigger words.
"""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from ..errors import UserError
from ..formats.adapter import split_adapter
from ..formats.checkpoint import Parts, check_weights, load_controlnet, named_like, read_parts, read_vae
from ..formats.embedding import embedding_vectors
from ..formats.identify import Kind
from ..formats.weights import read_weights, refuse_not_finite
from ..method.bridge import check_window
from ..text.english import trigger_tokens
from .controlnet import ControlNetHook
from .stack import Layer, LayeredWeights, Place

_HOOK = "bdm.plugins.controlnet."
#: Who has asked for a module. Two that put layers on it would each take the other's for the base.
_HOSTS: WeakKeyDictionary[nn.Module, WeakSet[PluginHost]] = WeakKeyDictionary()


class PluginHost:
    """A pipeline, or a bare ``Backbone``, as plug-ins see it.

    Args:
        host: has ``unet``, ``vae``, ``text_encoder`` and ``tokenizer`` as attributes, or some of them.

    Attributes:
        controlnets: the hooks of the ControlNets by name.
    """

    def __init__(self, host: Any) -> None:
        self.controlnets: dict[str, ControlNetHook] = {}
        self._host = host
        self._modules: dict[str, nn.Module] = {}
        self._weights = LayeredWeights(self._part)
        self._tokenizer: Any = None

    @property
    def kinds(self) -> dict[Kind, Callable[..., dict[str, float] | None]]:
        """How each kind is attached.

        (file, name, settings) -> its strength, None where that has no meaning.
        """
        return {
            "checkpoint": self._attach_checkpoint, "vae": self._attach_vae, "adapter": self._attach_adapter,
            "controlnet": self._attach_controlnet, "embedding": self._attach_embedding,
        }  # fmt: skip

    def detach(self, kind: Kind, name: str) -> None:
        """Undo what a plug-in does.

        Raises:
            UserError: its module was exchanged or is offloaded; nothing has changed then.
        """
        if kind == "controlnet":
            self._registry().remove_hook(_HOOK + name, recurse=False)
            del self.controlnets[name]
        else:
            self._weights.remove(name)
        if kind == "embedding":
            self._rebuild_tokenizer()

    def set_adapter_strength(
        self, name: str, strength: float, text_strength: float | None
    ) -> dict[str, float]:
        """Change an adapter's strengths; returns them by part.

        Raises:
            UserError: a strength is no finite number, or makes a weight overflow; the adapter's module was
                exchanged or is offloaded. Nothing has changed then.
        """
        strengths = _strengths(strength, text_strength)
        self._weights.put(name, Layer(changes=self._weights.layers[name].changes, strength=strengths))
        return strengths

    def _part(self, part: str) -> nn.Module:
        module = getattr(self._host, part, None)
        if module is None:
            raise UserError(f"the pipeline has no {part.replace('_', ' ')} that this plug-in could change")
        known = self._modules.get(part)
        if known is not None and known is not module and self.changes(known):
            raise UserError(
                f"the pipeline's {part} was exchanged while plug-ins were on it; put the old one back,"
                " detach, then exchange"
            )
        refuse_shared(module, self, part)
        self._modules[part] = module
        _HOSTS.setdefault(module, WeakSet()).add(self)
        return module

    def changes(self, module: nn.Module) -> bool:
        """Whether an attached plug-in is on this module."""
        parts = {part for layer in self._weights.layers.values() for part, _ in layer.places()}
        parts |= {"unet"} if self.controlnets else set()
        return any(self._modules.get(part) is module for part in parts)

    def _registry(self) -> Any:
        from diffusers.hooks import HookRegistry

        return HookRegistry.check_if_exists_or_initialize(self._part("unet"))

    def _attach_checkpoint(self, path: Path, name: str) -> None:
        parts = read_parts(path)
        self._check_scaling(parts, path)
        layer = Layer()
        for part, weights in parts.weights.items():
            if getattr(self._host, part, None) is not None:
                layer.replaced |= self._replacement(part, weights, path)
        self._weights.put(name, layer)

    def _attach_vae(self, path: Path, name: str) -> None:
        parts = read_vae(path)
        layer = Layer(replaced=self._replacement("vae", parts.weights["vae"], path))
        self._check_scaling(parts, path)
        self._weights.put(name, layer)

    def _check_scaling(self, parts: Parts, path: Path) -> None:
        """Refuse a VAE whose latents have another scale: the UNet would read them wrongly."""
        vae = getattr(self._host, "vae", None)
        theirs = parts.configs.get("vae", {}).get("scaling_factor")
        if vae is None or theirs is None or "vae" not in parts.weights:
            return
        if theirs != (ours := vae.config["scaling_factor"]):
            raise UserError(
                f"{path} scales latents by {theirs} and this pipeline by {ours}; use a VAE of the same model"
                " family"
            )

    def _replacement(self, part: str, weights: Mapping[str, Tensor], path: Path) -> dict[Place, Tensor]:
        own = self._weights.base(part)
        weights = named_like(own, weights)
        check_weights(own, weights, f"{path} ({part})")
        return {(part, key): tensor for key, tensor in weights.items()}

    def _attach_adapter(
        self, path: Path, name: str, strength: float = 1.0, text_strength: float | None = None
    ) -> dict[str, float]:
        file = read_weights(path)
        refuse_not_finite(file.tensors, path)
        own = {
            part: self._weights.base(part)
            for part in ("unet", "text_encoder")
            if getattr(self._host, part, None) is not None
        }
        # Adapters name modules without the prefix that older transformers put before the text encoder's.
        live = {
            part: {
                key.rpartition(".")[0].removeprefix("text_model."): key.rpartition(".")[0] for key in weights
            }
            for part, weights in own.items()
        }
        layer = Layer(strength=_strengths(strength, text_strength))
        for part, changes in split_adapter(file, live).items():
            for module, change in changes.items():
                weight, bias = (f"{live[part][module]}.{kind}" for kind in ("weight", "bias"))
                if change.factors.keys() - {"bias"}:
                    layer.changes[part, weight] = change.weight
                if "bias" in change.factors and bias not in own[part]:
                    raise UserError(
                        f"{path} changes a bias of {module}, which has none; the file is made for another"
                        " base"
                    )
                if change.reaches_bias and bias in own[part]:
                    layer.changes[part, bias] = change.bias
        self._weights.put(name, layer)
        return layer.strength

    def _attach_controlnet(
        self, path: Path, name: str, strength: float = 1.0, start: float = 0.0, end: float = 1.0
    ) -> dict[str, float]:
        check_window(start, end, "ControlNet")
        unet: Any = self._part("unet")
        if unet.device.type == "meta":
            raise UserError("the UNet is offloaded; attach ControlNets before sequential offload is enabled")
        hook = ControlNetHook(load_controlnet(path, unet.dtype).to(unet.device), finite(strength), start, end)
        if (registry := self._registry()).get_hook(_HOOK + name) is not None:  # of a pipeline that is gone
            registry.remove_hook(_HOOK + name, recurse=False)
        hook.attach(unet, _HOOK + name)
        self.controlnets[name] = hook
        return {"scale": strength, "start": start, "end": end}

    def _attach_embedding(self, path: Path, name: str) -> None:
        place = self._embedding_place()
        table = self._weights.base("text_encoder")[place[1]]
        vectors = embedding_vectors(read_weights(path), table.shape[1])
        pristine = self._tokenizer or getattr(self._host, "tokenizer", None)
        if pristine is None:
            raise UserError(
                "the pipeline has no tokenizer that could learn a trigger word; attach embeddings to a"
                " whole one"
            )
        if len(pristine) != len(table):
            raise UserError(
                f"the tokenizer has {len(pristine)} tokens and the text encoder {len(table)}; they must be"
                " equal"
            )
        if not name.strip() or re.search(r"[<>\ud800-\udfff]", name):
            raise UserError(
                f"{name!r} cannot be a trigger word; attach the embedding under a name without < and >"
            )
        known = {token.lower() for token in self._host.tokenizer.get_vocab()}
        if known & {token.lower() for token in trigger_tokens(name, len(vectors))}:
            raise UserError(f"the trigger word {name!r} is taken; attach the embedding under another name")
        self._weights.put(name, Layer(rows={place: vectors.clone()}))
        try:
            self._rebuild_tokenizer()
        except Exception as error:  # the tokenizer's library says little of what it refuses
            self._weights.remove(name)
            raise UserError(
                f"the tokenizer refuses the trigger word {name!r} ({error}); give another name"
            ) from None

    def _triggers(self) -> dict[str, int]:
        """Trigger word -> number of vectors, in the order of their rows."""
        place = self._embedding_place()
        return {
            name: len(layer.rows[place])
            for name, layer in self._weights.layers.items()
            if place in layer.rows
        }

    def _embedding_place(self) -> Place:
        encoder: Any = self._part("text_encoder")
        table = encoder.get_input_embeddings().weight
        return "text_encoder", next(name for name, p in encoder.named_parameters() if p is table)

    def _rebuild_tokenizer(self) -> None:
        """Give the host a copy of its tokenizer that knows the trigger words.

        Its own again when there are none.
        """
        from tokenizers import AddedToken

        if self._tokenizer is None:
            self._tokenizer = self._host.tokenizer
        triggers = self._triggers()
        tokenizer = copy.deepcopy(self._tokenizer) if triggers else self._tokenizer
        for name, count in triggers.items():
            tokenizer.add_tokens(
                [AddedToken(token, normalized=False) for token in trigger_tokens(name, count)]
            )
        self._host.tokenizer = tokenizer
        if not triggers:
            self._tokenizer = None


def refuse_shared(module: nn.Module, host: PluginHost, part: str) -> None:
    """Refuse a module that plug-ins of another host are on.

    Raises:
        UserError: they must be detached first.
    """

    def taken() -> bool:
        return any(other is not host and other.changes(module) for other in _HOSTS.get(module, ()))

    if taken():
        gc.collect()  # a pipeline that nobody holds any more stays until then
    if taken():
        raise UserError(
            f"another pipeline that shares this {part.replace('_', ' ')} has plug-ins on it; attach there, or"
            " detach those first"
        )


def holders(kind: Kind | None, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds of file that a plug-in can come from.

    Args:
        kind: the plug-in's; None where any will do.
        kinds: all that there are.

    Raises:
        UserError: no plug-in is of that kind.
    """
    if kind is None:
        return kinds
    if kind not in kinds:
        raise UserError(f"there are no plug-ins of kind {kind!r}; allowed: {', '.join(kinds)}")
    return ("vae", "checkpoint") if kind == "vae" else (kind,)


def _strengths(strength: float, text_strength: float | None) -> dict[str, float]:
    return {
        "unet": finite(strength),
        "text_encoder": finite(strength if text_strength is None else text_strength),
    }


def finite(strength: Any) -> float:
    """A strength as a number.

    Raises:
        UserError: it is none, or not finite.
    """
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise UserError(f"strength {strength!r} is not a finite number; give one such as 0.8")
    return float(strength)
