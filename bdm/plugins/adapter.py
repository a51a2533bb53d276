"""Adapters (the LoRA family): changes of single weights, at a strength for UNet and text encoder each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..formats.adapter import split_adapter, split_key, text_keys
from ..formats.bundled import BUNDLED, bundled_embeddings
from ..formats.change import Change
from ..formats.embedding import as_rows
from ..formats.signs import refuse_other_base, refuse_other_noise
from ..formats.weights import WeightFile, read_weights, refuse_not_finite
from .kind import PluginKind, Strengths, finite
from .low_rank import LowRank, low_rank_changes
from .stack import Place, WeightDelta

_PARTS = ("unet", "text_encoder")
#: How keys for the text encoder begin.
_TEXT_KEYS = ("lora_te_", "lora_te1_", "lycoris_te_", "text_encoder.", BUNDLED)


class AdapterKind(PluginKind):
    """An adapter's changes are added to the weights."""

    kind = "adapter"
    sources = ("adapter",)

    def attach(
        self, path: Path, name: str, strength: float = 1.0, text_strength: float | None = None
    ) -> Strengths:
        """Add an adapter's changes to the weights (see ``PluginKind.attach``).

        Embeddings that lie in its file become trigger words, as if they had been attached under these.

        Args:
            path: the file.
            name: of the plug-in.
            strength: factor of the UNet's changes.
            text_strength: of the text encoder's; the same if it is left out.
        """
        file = self._read(path)
        delta = self._bundled(file, path)
        delta.strength = self.strengths(name, strength, text_strength)
        own = self._own()
        for part, changes in self._split(file, own).items():
            for module, change in changes.items():
                for kind in _reached(change, module, own[part], path):
                    place: Place = (part, f"{module}.{kind}")
                    delta.changes[place] = change.weight if kind == "weight" else change.bias
        self.to.words.put(name, delta)
        return delta.strength

    def low_rank(self, path: Path) -> dict[str, dict[str, LowRank]] | None:
        """What a file adds to layers' outputs at strength 1, by part and module; nothing is attached.

        Returns:
            None where that does not say all that the file does (see ``bdm.plugins.low_rank``).

        Raises:
            UserError: as ``attach``.
        """
        file = self._read(path)
        if any(key.startswith(BUNDLED) for key in file.tensors):
            return None
        found: dict[str, dict[str, LowRank]] = {}
        for part, changes in self._split(file, self._own()).items():
            self.to.weights.check(part)
            layers = low_rank_changes(self.to.part(part), changes)
            if layers is None:
                return None
            found[part] = layers
        return found

    def _read(self, path: Path) -> WeightFile:
        """A file that fits what the adapter is to act on, as far as can be told without its modules."""
        file = read_weights(path)
        refuse_not_finite(file.tensors, path)
        refuse_other_base(file)
        if self.to.has("unet"):
            refuse_other_noise(file, self.to.noise)
        if self.to.without_english:
            file = self._without_text(file)
        self._refuse_missing_text(file.tensors, path)
        return file

    def _own(self) -> dict[str, dict[str, Tensor]]:
        return {part: self.to.weights.base(part) for part in _PARTS if self.to.has(part)}

    def _split(
        self, file: WeightFile, own: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Change]]:
        """By part, the change of each module, by the module's own name."""
        live = {part: _modules([*weights, *self.to.weights.foreign(part)]) for part, weights in own.items()}
        return {
            part: {live[part][module]: change for module, change in changes.items()}
            for part, changes in split_adapter(file, live).items()
        }

    def _without_text(self, file: WeightFile) -> WeightFile:
        """What is left of an adapter where there is no English text encoder, said with its number."""
        text = set(text_keys(file.tensors))
        if not text:
            return file
        words = len(bundled_embeddings(file))
        changed = {split_key(key)[0] for key in text if not key.startswith(BUNDLED)}
        told = [f"changes of {len(changed)} text modules"] * bool(changed)
        told += [f"{words} embedding{'s' if words > 1 else ''}"] * bool(words)
        self.to.leave_out(" and ".join(told) + (" are" if len(changed) + words > 1 else " is"), file.path)
        kept = {key: tensor for key, tensor in file.tensors.items() if key not in text}
        return replace(file, tensors=kept)

    def _bundled(self, file: WeightFile, path: Path) -> WeightDelta:
        """The delta of the embeddings in an adapter's file; an empty one where there are none."""
        if not any(key.startswith(BUNDLED) for key in file.tensors):
            return WeightDelta()
        width = self.to.words.width()
        vectors = {word: as_rows(tensor, width, path) for word, tensor in bundled_embeddings(file).items()}
        return self.to.words.rows(vectors, path)

    def _refuse_missing_text(self, keys: Iterable[str], path: Path) -> None:
        """Refuse changes of a text encoder that the pipeline lacks, as one loaded with ``english=False``."""
        text = next((key for key in keys if key.startswith(_TEXT_KEYS)), None)
        if text is not None and not self.to.has("text_encoder"):
            raise UserError(
                f"{path} changes the text encoder ({text}), and the pipeline has none; load it with its"
                " English text encoder"
            )

    def detach(self, name: str) -> None:
        """Take an adapter's changes off the weights, and what it bundles from the tokenizer."""
        self.to.words.remove(name)

    def strengths(self, name: str, strength: float, text_strength: float | None) -> Strengths:
        """Any finite number; 0 is without effect, 1 what the file was made for."""
        return {
            "unet": finite(strength),
            "text_encoder": finite(strength if text_strength is None else text_strength),
        }

    def set_strengths(self, name: str, strengths: Mapping[str, float]) -> None:
        """Add the changes at other strengths."""
        delta = self.to.weights.deltas[name]
        self.to.weights.put(name, replace(delta, strength=dict(strengths)))


def _modules(weights: Iterable[str]) -> dict[str, str]:
    """The modules of a part by the names that adapters give them.

    Those are without the prefix that older transformers put before the text encoder's.
    """
    modules = dict.fromkeys(key.rpartition(".")[0] for key in weights)
    return {module.removeprefix("text_model."): module for module in modules}


def _reached(change: Change, module: str, own: Mapping[str, Tensor], path: Path) -> Iterator[str]:
    """Which of a module's parameters, "weight" and "bias", a change reaches."""
    if change.factors.keys() - {"bias"}:
        yield "weight"
    has_bias = f"{module}.bias" in own
    if "bias" in change.factors and not has_bias:
        raise UserError(
            f"{path} changes a bias of {module}, which has none; the file is made for another base"
        )
    if change.reaches_bias and has_bias:
        yield "bias"
