"""Plug-ins: checkpoint, VAE, adapter (LoRA family), ControlNet and textual inversion, each attached and detached alike.

Everything that changes weights goes through one mechanism, ``LayeredWeights``: a weight in use is the base (or the last
replacement) plus the sum of the adapters' changes. It is always worked out from the untouched base, so detaching in any
order gives back the very tensors from before.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bridge import check_window
from .controlnet import ControlCondition, ControlNetHook, control_tensor
from .errors import UserError
from .formats.adapter import split_adapter
from .formats.checkpoint import check_names, load_controlnet, named_like, read_parts, read_vae
from .formats.embedding import embedding_vectors
from .formats.identify import Kind, file_hashes, identify_source, require, source_hash
from .text.english import trigger_tokens
from .weights import WEIGHT_SUFFIXES, read_weights, refuse_not_finite, resolve_folder

#: A weight's place: part of the pipeline and name of the parameter.
Place = tuple[str, str]

_HOOK = "bdm.controlnet."


@dataclass
class Layer:
    """What one plug-in does to weights.

    Attributes:
        replaced: weights that take the base's place.
        changes: from a base weight to its change at strength 1 (float32).
        rows: rows appended to a weight (token embeddings).
        strength: factor of the changes, by part.
    """

    replaced: dict[Place, Tensor] = field(default_factory=dict)
    changes: dict[Place, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    rows: dict[Place, Tensor] = field(default_factory=dict)
    strength: dict[str, float] = field(default_factory=dict)

    def places(self) -> set[Place]:
        """The weights it touches."""
        return {*self.replaced, *self.changes, *self.rows}


class LayeredWeights:
    """The weights of live modules as a base and layers on it.

    Args:
        module: gives the module of a part.
    """

    def __init__(self, module: Callable[[str], nn.Module]) -> None:
        self._module = module
        self._layers: dict[str, Layer] = {}
        self._base: dict[Place, Tensor] = {}

    def base(self, part: str) -> dict[str, Tensor]:
        """The base weights of a part by name."""
        return {name: self._base.get((part, name), p.data) for name, p in self._module(part).named_parameters()}

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name, in the order they were put on."""
        return self._layers

    def put(self, name: str, layer: Layer) -> None:
        """Add a layer, or replace the one of that name; if it fails, nothing has changed."""
        before = self._layers.get(name, Layer())
        self._apply({**self._layers, name: layer}, before.places() | layer.places())

    def remove(self, name: str) -> None:
        """Take a layer away."""
        layers = {key: layer for key, layer in self._layers.items() if key != name}
        self._apply(layers, self._layers[name].places() if name in self._layers else set())

    @torch.no_grad()
    def _apply(self, layers: dict[str, Layer], places: set[Place]) -> None:
        parameters = {part: dict(self._module(part).named_parameters()) for part in {part for part, _ in places}}
        for part, name in places:
            if name not in parameters[part]:
                raise UserError(
                    f"the pipeline's {part} no longer has {name}; undo what was done to it since the plug-in was attached"
                )
        # Everything is worked out before anything is changed.
        fresh = {(part, name): self._compute((part, name), parameters[part][name], layers) for part, name in places}
        for (part, name), data in fresh.items():
            parameter = parameters[part][name]
            self._base.setdefault((part, name), parameter.data)
            parameter.data = data
        in_use = {place for layer in layers.values() for place in layer.places()}
        self._base = {place: tensor for place, tensor in self._base.items() if place in in_use}
        self._layers = layers

    def _compute(self, place: Place, parameter: nn.Parameter, layers: Mapping[str, Layer]) -> Tensor:
        if parameter.is_meta:
            raise UserError(f"{'.'.join(place)} is offloaded; attach and detach plug-ins before sequential offload is enabled")
        weight = self._base.get(place, parameter.data)
        if (weight.device, weight.dtype) != (parameter.device, parameter.dtype):  # the pipeline was moved meanwhile
            weight = weight.to(parameter.device, parameter.dtype)
        for layer in layers.values():
            if place in layer.replaced:
                weight = layer.replaced[place].to(weight.device, weight.dtype)
        total = None
        for layer in layers.values():
            strength = layer.strength.get(place[0], 1.0)
            if place in layer.changes and strength != 0.0:
                change = layer.changes[place](weight) * strength
                total = change if total is None else total + change
        if total is not None:
            weight = (weight.float() + total).to(weight.dtype)
        rows = [layer.rows[place].to(weight.device, weight.dtype) for layer in layers.values() if place in layer.rows]
        return torch.cat([weight, *rows]) if rows else weight


@dataclass
class Plugin:
    """One attached plug-in.

    Attributes:
        name: unique within a pipeline.
        kind: its role.
        source: the file or folder it came from.
        strength: what ``set_strength`` set; None where strength has no meaning.
    """

    name: str
    kind: Kind
    source: Path
    strength: dict[str, float] | None = None

    @cached_property
    def hash(self) -> str:
        """What A1111 shows: ten digits of the file's SHA-256; for adapters twelve of their tensor data's."""
        if self.kind == "adapter" and self.source.suffix == ".safetensors":
            return file_hashes(self.source)["data hash"]
        return source_hash(self.source)

    def __str__(self) -> str:
        strength = "" if self.strength is None else " " + ", ".join(f"{part} {value:g}" for part, value in self.strength.items())
        return f"{self.name}: {self.kind}{strength} [{self.hash}] from {self.source}"


class Plugins:
    """The plug-ins of a pipeline, or of a bare ``Backbone``.

    Example:
        >>> pipe.plugins.attach("ink.safetensors", strength=0.8)
        >>> picture = pipe("红灯笼", prompt_en="ink style").images[0]
        >>> pipe.plugins.detach("ink")
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._modules: dict[str, nn.Module] = {}
        self._plugins: dict[str, Plugin] = {}
        self._weights = LayeredWeights(self._part)
        self._controlnets: dict[str, ControlNetHook] = {}
        self._tokenizer: Any = None

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self._plugins.values())

    def __len__(self) -> int:
        return len(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._plugins

    def __getitem__(self, name: str) -> Plugin:
        if name not in self._plugins:
            raise UserError(f"no plug-in is called {name!r}; attached are: {', '.join(self._plugins) or 'none'}")
        return self._plugins[name]

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no plug-ins"

    def attach(self, source: str | Path, name: str | None = None, **settings: Any) -> Plugin:
        """Attach a file or folder; what it is, it says itself.

        Args:
            source: a checkpoint, VAE, adapter, ControlNet or embedding: file, diffusers folder or hub name.
            name: how it is called from now on; the file's stem by default. An embedding's name is its trigger word.
            settings: adapters: ``strength`` (1.0) and ``text_strength`` (the same) for UNet and text encoder; ControlNets:
                ``strength``, ``start``, ``end`` (share of the steps).

        Returns:
            What is now attached.

        Raises:
            UserError: the file is damaged, of another kind or base, or the name is taken; nothing has changed then.
        """
        path = Path(source)
        if not path.exists():
            if path.suffix.lower() in WEIGHT_SUFFIXES:
                raise UserError(f"{source}: no such file; check the path")
            path = resolve_folder(source)
        # A hub name's folder is called by a commit, and a folder's name may hold a dot.
        name = name or (path.stem if path.is_file() else Path(source).name)
        if name in self._plugins:
            raise UserError(f"a plug-in is called {name!r} already; detach it or give another name")
        found = identify_source(path)
        attach: dict[Kind, Callable[..., dict[str, float] | None]] = {
            "checkpoint": self._attach_checkpoint, "vae": self._attach_vae, "adapter": self._attach_adapter,
            "controlnet": self._attach_controlnet, "embedding": self._attach_embedding,
        }  # fmt: skip
        require(found, tuple(attach), path)
        try:
            strength = attach[found.kind](path, name, **settings)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise UserError(f"{path}: a {found.kind} takes no setting {str(error).rpartition(' ')[2]}") from None
        self._plugins[name] = Plugin(name, found.kind, path, strength)
        return self._plugins[name]

    def set_strength(self, name: str, strength: float, text_strength: float | None = None) -> None:
        """Change the strength of an adapter or a ControlNet; nothing is read again.

        Raises:
            UserError: no such plug-in, or one whose strength has no meaning.
        """
        plugin = self[name]
        if plugin.kind == "adapter":
            layer = self._weights.layers[name]
            strengths = _strengths(strength, text_strength)
            self._weights.put(name, Layer(changes=layer.changes, strength=strengths))
            plugin.strength = strengths
        elif plugin.kind == "controlnet" and text_strength is None:
            self._controlnets[name].scale = _number(strength)
            plugin.strength = {**(plugin.strength or {}), "scale": strength}
        else:
            raise UserError(
                f"{name} is a {plugin.kind}; {'text_' if plugin.kind == 'controlnet' else ''}strength has no meaning for it"
            )

    def detach(self, name: str) -> None:
        """Take a plug-in off; without any, every output is bit for bit what it was at first."""
        plugin = self[name]
        if plugin.kind == "controlnet":
            self._registry().remove_hook(_HOOK + name, recurse=False)
            del self._controlnets[name]
        else:
            self._weights.remove(name)
        del self._plugins[name]
        if plugin.kind == "embedding":
            self._rebuild_tokenizer()

    def clear(self) -> None:
        """Detach all."""
        for name in list(self._plugins):
            self.detach(name)

    @contextmanager
    def during_call(
        self,
        control_images: Any = None,
        strength: Mapping[str, float | tuple[float, float]] | None = None,
        steps: Callable[[], int] = lambda: 1,
        images_per_prompt: int = 1,
    ) -> Iterator[None]:
        """Hand the condition pictures to the ControlNets and set strengths for one call of the pipeline.

        Args:
            control_images: pictures by ControlNet name, or the only one's.
            strength: by plug-in name; a pair gives UNet and text encoder apart.
            steps: gives the pipeline's number of steps.
            images_per_prompt: pictures for each prompt.

        Raises:
            UserError: a ControlNet without a picture, a picture without a ControlNet.
        """
        pictures = self._pictures(control_images)
        with ExitStack() as stack:
            for name, value in (strength or {}).items():
                before = self[name].strength or {}
                pair = tuple(value) if isinstance(value, tuple | list) else (value, None)
                if len(pair) != 2:
                    raise UserError(f"strength of {name}: {value!r}; give a number, or a pair for UNet and text encoder")
                own, text = pair
                # Restored through the same call, so that a strength of an adapter's two parts comes back as it was.
                restore = (before.get("unet", before.get("scale", 1.0)), before.get("text_encoder"))
                self.set_strength(name, own, text)
                stack.callback(self.set_strength, name, *restore)
            for name, hook in self._controlnets.items():
                stack.enter_context(hook.condition(ControlCondition(pictures[name], steps, images_per_prompt)))
            yield

    def _pictures(self, given: Any) -> dict[str, Tensor]:
        names = list(self._controlnets)
        if given is not None and not isinstance(given, Mapping):
            if len(names) != 1:
                raise UserError(f"one control picture is given for {len(names)} ControlNets; give control_images={{name: picture}}")
            given = {names[0]: given}
        given = dict(given or {})
        missing, extra = [n for n in names if n not in given], [n for n in given if n not in names]
        if missing or extra:
            what = (
                f"no control picture for {missing[0]!r}"
                if missing
                else f"a control picture for {extra[0]!r}, which is not attached"
            )
            raise UserError(f"{what}; attached ControlNets: {', '.join(names) or 'none'}")
        return {name: control_tensor(pictures) for name, pictures in given.items()}

    def _part(self, part: str) -> nn.Module:
        module = getattr(self._host, part, None)
        if module is None:
            raise UserError(f"the pipeline has no {part.replace('_', ' ')} that this plug-in could change")
        if self._modules.setdefault(part, module) is not module:
            if self._plugins:
                raise UserError(f"the pipeline's {part} was exchanged while plug-ins were attached; detach them first")
            self._modules[part] = module
        return module

    def _registry(self) -> Any:
        from diffusers.hooks import HookRegistry

        return HookRegistry.check_if_exists_or_initialize(self._part("unet"))

    def _attach_checkpoint(self, path: Path, name: str) -> None:
        parts = read_parts(path)
        layer = Layer()
        for part, weights in parts.weights.items():
            if getattr(self._host, part, None) is not None:
                layer.replaced |= self._replacement(part, weights, path)
        self._weights.put(name, layer)

    def _attach_vae(self, path: Path, name: str) -> None:
        parts = read_vae(path)
        vae: Any = self._part("vae")
        theirs, ours = parts.configs.get("vae", {}).get("scaling_factor"), vae.config["scaling_factor"]
        if theirs is not None and theirs != ours:
            raise UserError(f"{path} scales latents by {theirs} and this pipeline by {ours}; use a VAE of the same model family")
        self._weights.put(name, Layer(replaced=self._replacement("vae", parts.weights["vae"], path)))

    def _replacement(self, part: str, weights: Mapping[str, Tensor], path: Path) -> dict[Place, Tensor]:
        own = self._weights.base(part)
        weights = named_like(own, weights)
        check_names(own, weights, f"{path} ({part})")
        return {(part, key): tensor for key, tensor in weights.items()}

    def _attach_adapter(self, path: Path, name: str, strength: float = 1.0, text_strength: float | None = None) -> dict[str, float]:
        file = read_weights(path)
        refuse_not_finite(file.tensors, path)
        own = {part: self._weights.base(part) for part in ("unet", "text_encoder") if getattr(self._host, part, None) is not None}
        # Adapters name modules without the prefix that older transformers put before the text encoder's.
        live = {
            part: {key.rpartition(".")[0].removeprefix("text_model."): key.rpartition(".")[0] for key in weights}
            for part, weights in own.items()
        }
        layer = Layer(strength=_strengths(strength, text_strength))
        for part, changes in split_adapter(file, live).items():
            for module, change in changes.items():
                weight, bias = (f"{live[part][module]}.{kind}" for kind in ("weight", "bias"))
                if change.factors.keys() - {"bias"}:
                    layer.changes[part, weight] = change.weight
                if "bias" in change.factors and bias not in own[part]:
                    raise UserError(f"{path} changes a bias of {module}, which has none; the file is made for another base")
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
        hook = ControlNetHook(load_controlnet(path, unet.dtype).to(unet.device), _number(strength), start, end)
        hook.attach(unet, _HOOK + name)
        self._controlnets[name] = hook
        return {"scale": strength, "start": start, "end": end}

    def _attach_embedding(self, path: Path, name: str) -> None:
        place = self._embedding_place()
        table = self._weights.base("text_encoder")[place[1]]
        vectors = embedding_vectors(read_weights(path), table.shape[1])
        pristine = self._tokenizer or self._host.tokenizer
        if len(pristine) != len(table):
            raise UserError(f"the tokenizer has {len(pristine)} tokens and the text encoder {len(table)}; they must be equal")
        if not name.strip() or re.search(r"[<>\ud800-\udfff]", name):
            raise UserError(f"{name!r} cannot be a trigger word; attach the embedding under a name without < and >")
        known = {token.lower() for token in self._host.tokenizer.get_vocab()}
        if known & {token.lower() for token in trigger_tokens(name, len(vectors))}:
            raise UserError(f"the trigger word {name!r} is taken; attach the embedding under another name")
        self._weights.put(name, Layer(rows={place: vectors.clone()}))
        try:
            self._rebuild_tokenizer()
        except Exception as error:  # the tokenizer's library says little of what it refuses
            self._weights.remove(name)
            raise UserError(f"the tokenizer refuses the trigger word {name!r} ({error}); give another name") from None

    def _triggers(self) -> dict[str, int]:
        """Trigger word -> number of vectors, in the order of their rows."""
        place = self._embedding_place()
        return {name: len(layer.rows[place]) for name, layer in self._weights.layers.items() if place in layer.rows}

    def _embedding_place(self) -> Place:
        encoder: Any = self._part("text_encoder")
        table = encoder.get_input_embeddings().weight
        return "text_encoder", next(name for name, p in encoder.named_parameters() if p is table)

    def _rebuild_tokenizer(self) -> None:
        """Give the host a copy of its tokenizer that knows the trigger words; its own again when there are none."""
        from tokenizers import AddedToken

        if self._tokenizer is None:
            self._tokenizer = self._host.tokenizer
        triggers = self._triggers()
        tokenizer = copy.deepcopy(self._tokenizer) if triggers else self._tokenizer
        for name, count in triggers.items():
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in trigger_tokens(name, count)])
        self._host.tokenizer = tokenizer
        if not triggers:
            self._tokenizer = None


def _strengths(strength: float, text_strength: float | None) -> dict[str, float]:
    return {"unet": _number(strength), "text_encoder": _number(strength if text_strength is None else text_strength)}


def _number(strength: Any) -> float:
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise UserError(f"strength {strength!r} is not a finite number; give one such as 0.8")
    return float(strength)
