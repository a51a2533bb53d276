"""The contract of plug-ins: attach, set strength, detach.

Names are unique, and whatever is detached leaves nothing behind.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, printable, quoted, refused_paths
from ..formats.identify import Kind, file_hashes, identify_source, require, source_hash
from ..formats.weights import WEIGHT_SUFFIXES, resolve_folder
from ..method.clock import Steps
from ..method.condition import Part
from .adapter import AdapterKind
from .attachments import Attachments
from .checkpoint import CheckpointKind
from .controlnet import ControlNetKind
from .controlnet_hook import ControlNetHook
from .embedding import EmbeddingKind
from .kind import PipelineCall, PluginKind
from .low_rank import LowRank
from .vae import VaeKind

_KINDS = (CheckpointKind, VaeKind, AdapterKind, ControlNetKind, EmbeddingKind)


@dataclass
class Plugin:
    """One attached plug-in.

    Attributes:
        name: unique within a pipeline.
        kind: its role.
        source: the file or folder it came from.
        hash: what A1111 shows: ten digits of the file's SHA-256; for adapters twelve of their tensor data's.
            Taken when it was attached, because the file may be replaced or deleted later.
        strength: what ``set_strength`` set; None where strength has no meaning.
        words: trigger words that it brings, for the English prompt.
    """

    name: str
    kind: Kind
    source: Path
    hash: str
    strength: dict[str, float] | None = None
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        strength = (
            ""
            if self.strength is None
            else " " + ", ".join(f"{part} {value:g}" for part, value in self.strength.items())
        )
        words = f" bringing {', '.join(map(quoted, self.words))}" if self.words else ""
        # Names, words and paths are those of files that others made.
        return printable(f"{self.name}: {self.kind}{strength}{words} [{self.hash}] from {self.source}", 2000)


class Plugins:
    """The plug-ins of a pipeline, or of a bare ``Backbone``.

    Example:
        >>> pipe.plugins.attach("ink.safetensors", strength=0.8)
        >>> picture = pipe("红灯笼", prompt_en="ink style").images[0]
        >>> pipe.plugins.detach("ink")
    """

    def __init__(self, pipe: Any) -> None:
        self._host = Attachments(pipe)
        self._kinds: dict[Kind, PluginKind] = {kind.kind: kind(self._host) for kind in _KINDS}
        self._plugins: dict[str, Plugin] = {}

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self._plugins.values())

    def __len__(self) -> int:
        return len(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._plugins

    def __getitem__(self, name: str) -> Plugin:
        if name not in self._plugins:
            raise UserError(
                f"no plug-in is called {name!r}; attached are: {', '.join(self._plugins) or 'none'}"
            )
        return self._plugins[name]

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no plug-ins"

    def attach(
        self, source: str | Path, name: str | None = None, *, kind: Kind | None = None, **settings: Any
    ) -> Plugin:
        """Attach a file or folder; what it is, it says itself.

        Args:
            source: a checkpoint, VAE, adapter, ControlNet or embedding: file, diffusers folder or hub name.
            name: how it is called from now on; the file's stem by default. An embedding's name is its trigger
                word.
            kind: what it must be ("checkpoint", "vae", "adapter", "controlnet", "embedding"). As "vae" a
                checkpoint gives its VAE alone.
            settings: checkpoints: ``base``, the model that it was trained from, to add its difference to that
                instead of putting its weights in place, with a ``strength`` (see
                ``bdm.plugins.checkpoint.CheckpointKind``); adapters: ``strength`` (1.0) and ``text_strength``
                (the same) for UNet and text encoder; ControlNets: ``strength``, ``start``, ``end`` (share of
                the steps), ``pooled`` (True or False, for shuffle ControlNets).

        Returns:
            What is now attached. The weights of a checkpoint or VAE stay on disk until they are used: its
            file must not be written over in place while it is attached (see
            ``bdm.formats.weights.WeightFile``).

        Raises:
            UserError: the file is damaged, of another kind or base, or the name is taken; nothing has changed
                then.
        """
        with refused_paths(source):
            return self._attach(source, name, kind, settings)

    def _attach(
        self, source: str | Path, name: str | None, kind: Kind | None, settings: dict[str, Any]
    ) -> Plugin:
        if not isinstance(source, str | os.PathLike):
            raise UserError(f"a plug-in's file cannot be {quoted(source)}; give a path or a hub name")
        path = Path(source)
        if not os.path.exists(path):  # which takes names of any length
            if path.suffix.lower() in WEIGHT_SUFFIXES:
                raise UserError(f"{printable(source, 300)}: no such file; check the path")
            path = resolve_folder(source)
        # A hub name's folder is called by a commit, and a folder's name may hold a dot.
        name = name or (path.stem if path.is_file() else Path(source).name)
        if not isinstance(name, str):
            raise UserError(f"a plug-in cannot be called {quoted(name)}; give a text")
        if name in self._plugins:
            raise UserError(f"a plug-in is called {name!r} already; detach it or give another name")
        found = identify_source(path)
        require(found, self._sources(kind), path)
        kind = kind or found.kind
        self._check_settings(kind, settings, path)
        shown = shown_hash(path, kind)
        with self._undone_unless_done(kind, name), torch.inference_mode(False):
            strength = self._kinds[kind].attach(path, name, **settings)
            words = tuple(self._host.words.of(name))
            self._plugins[name] = Plugin(name, kind, path, shown, strength, words)
        return self._plugins[name]

    @contextmanager
    def _undone_unless_done(self, kind: Kind, name: str) -> Iterator[None]:
        """Whatever ends an attachment, an interrupt by the user too, leaves nothing of it behind."""
        try:
            yield
        except BaseException:
            self._plugins.pop(name, None)
            self._kinds[kind].detach(name)
            raise

    def _sources(self, kind: Kind | None) -> tuple[Kind, ...]:
        """The kinds of file that a plug-in of a kind can come from; None stands for any kind."""
        if kind is None:
            return tuple(self._kinds)
        if not isinstance(kind, str) or kind not in self._kinds:
            allowed = ", ".join(self._kinds)
            raise UserError(f"there are no plug-ins of kind {quoted(kind)}; allowed: {allowed}")
        return self._kinds[kind].sources

    def _check_settings(self, kind: Kind, settings: Mapping[str, Any], path: Path) -> None:
        known = list(inspect.signature(self._kinds[kind].attach).parameters)[2:]  # without path and name
        unknown = [setting for setting in settings if setting not in known]
        if unknown:
            allowed = ", ".join(known) or "none"
            raise UserError(f"{path}: a {kind} takes no setting {quoted(unknown[0])}; allowed: {allowed}")

    def set_strength(self, name: str, strength: float, text_strength: float | None = None) -> None:
        """Change the strength of an adapter or a ControlNet; nothing is read again.

        Args:
            name: of the plug-in.
            strength: any finite number; 0 is without effect, 1 what the file was made for.
            text_strength: of an adapter's text-encoder part; ``strength`` if it is left out, whatever it was
                before.

        Raises:
            UserError: no such plug-in, one whose strength has no meaning, a strength that is no finite number
                or makes a weight overflow; nothing has changed then.
        """
        strengths = self._kinds[self[name].kind].strengths(name, strength, text_strength)
        self._put_strengths(name, strengths)

    def _put_strengths(self, name: str, strengths: Mapping[str, float]) -> None:
        plugin = self[name]
        self._kinds[plugin.kind].set_strengths(name, strengths)
        plugin.strength = {**(plugin.strength or {}), **strengths}

    def detach(self, name: str) -> None:
        """Take a plug-in off; without any, every output is bit for bit what it was at first.

        Raises:
            UserError: no such plug-in; its module was exchanged or is offloaded, so that it stays.
        """
        self._kinds[self[name].kind].detach(name)
        del self._plugins[name]

    def clear(self) -> None:
        """Detach all."""
        for name in list(self._plugins):
            self.detach(name)

    @contextmanager
    def during_call(
        self,
        control_images: Any = None,
        strength: Mapping[str, float | tuple[float, float]] | None = None,
        steps: Steps = lambda: 1,
        images_per_prompt: int = 1,
        latents: tuple[int, int] | None = None,
        samples: int | None = None,
        parts: Callable[[], Sequence[Part]] | None = None,
        controlnets: Mapping[str, ControlNetHook] | None = None,
    ) -> Iterator[None]:
        """Hand the condition pictures to the ControlNets and set strengths for one call of the pipeline.

        Args:
            control_images: pictures by ControlNet name, or the only one's.
            strength: by plug-in name; a pair gives UNet and text encoder apart.
            steps: gives the pipeline's number of denoising steps, or its timesteps.
            images_per_prompt: pictures for each prompt.
            latents: their height and width where they are known; else the first step finds pictures of
                another size.
            samples: prompts x images_per_prompt; ControlNets that pool their residuals need it.
            parts: gives the parts of the UNet's batches where their texts do not tell them apart.
            controlnets: hooks by name that act in this call, on whatever UNet they hang; None for those that
                are attached.

        Raises:
            UserError: a ControlNet without a picture, a picture without a ControlNet or of another size, a
                strength that is none, a part that was exchanged while plug-ins were on it.
        """
        self._host.check()
        if not isinstance(strength or {}, Mapping):
            raise UserError(f"plugin_strength is {quoted(strength)}; give strengths by the names of plug-ins")
        call = PipelineCall(control_images, steps, images_per_prompt, latents, samples, parts, controlnets)
        with ExitStack() as stack:
            for kind in self._kinds.values():
                stack.enter_context(kind.during(call))
            for name, value in (strength or {}).items():
                if self._would_change(name, _pair(name, value)):
                    stack.callback(self._restore_strengths, name, self[name].strength)
                    self.set_strength(name, *_pair(name, value))
            yield

    def _would_change(self, name: str, strength: tuple[float, float | None]) -> bool:
        """Whether a plug-in has other strengths than these."""
        plugin = self[name]
        wanted = self._kinds[plugin.kind].strengths(name, *strength)
        return {**(plugin.strength or {}), **wanted} != plugin.strength

    def _restore_strengths(self, name: str, strengths: dict[str, float] | None) -> None:
        if name in self and strengths is not None and self[name].strength != strengths:
            self._put_strengths(name, strengths)

    def low_rank(self, source: str | Path) -> dict[str, dict[str, LowRank]] | None:
        """What an adapter's file adds to layers' outputs at strength 1, by part and module.

        It can be added for each sample of a batch at another strength (see ``bdm.plugins.low_rank``). Nothing
        is attached.

        Returns:
            None where that does not say all that the file does.

        Raises:
            UserError: the file is damaged, or does not fit.
        """
        with refused_paths(source):
            kind = self._kinds["adapter"]
            assert isinstance(kind, AdapterKind)
            return kind.low_rank(Path(source))

    @property
    def controlnets(self) -> Mapping[str, ControlNetHook]:
        """The hooks of the attached ControlNets, by name."""
        return self._host.controlnets


def _pair(name: str, value: Any) -> tuple[float, float | None]:
    """A strength for one call as one for the UNet and one for the text encoder."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, None)
    if len(pair) != 2:
        raise UserError(
            f"strength of {name}: {quoted(value)}; give a number, or a pair for UNet and text encoder"
        )
    return pair


def shown_hash(source: Path, kind: Kind) -> str:
    """The hash by which others know a plug-in's file (see ``Plugin``)."""
    hashes = file_hashes(source) if kind == "adapter" else {}
    return hashes.get("data hash") or source_hash(source)
