"""Which of a folder's files its weights are read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

#: Names of weight files without their endings, by ending: transformers' first, then diffusers'.
_STEMS = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}


@dataclass(frozen=True)
class FileChoice:
    """What a reader asks for where a folder holds its weights more than once.

    Attributes:
        variant: "fp16" asks for ``model.fp16.safetensors`` in place of ``model.safetensors``. Without one,
            the plain file is read, and half precision where there is no plain one.
        use_safetensors: True reads no pickle, False nothing else; None prefers safetensors.
        or_plain: whether the plain file will do where the variant is missing.
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    or_plain: bool = False

    def names(self) -> list[str]:
        """Names of whole weight files, preferred first."""
        return [
            f"{stem}{_infix(variant)}{ending}" for variant, ending in self._kinds() for stem in _STEMS[ending]
        ]

    def find(self, folder: Path) -> tuple[list[Path], Path | None]:
        """The files that hold a folder's weights, with the index that names them where they are shards."""
        for variant, ending in self._kinds():
            for stem in _STEMS[ending]:
                whole = folder / f"{stem}{_infix(variant)}{ending}"
                if whole.exists():
                    return [whole], None
            for stem in _STEMS[ending]:
                index = folder / f"{stem}{ending}.index{_infix(variant)}.json"
                if index.exists():
                    return sorted(_shards(folder, stem, variant, ending)), index
        return [], None

    def among(self, folders: Iterable[Path], source: object) -> FileChoice:
        """The same choice for a model in several folders: a part without the variant is read without it.

        Raises:
            UserError: no folder holds the variant.
        """
        if self.variant and not any(self.find(folder)[0] for folder in folders):
            # The words that diffusers' own tests look for.
            raise UserError(
                f"You are trying to load the model files of the `variant={self.variant}`, and {source} holds"
                " none of that variant; leave variant out, or get the folder again"
            )
        return dataclasses.replace(self, or_plain=True)

    def check_file(self, path: str | Path) -> None:
        """Refuse a single file, beside which there is nothing to choose, if it is not what is asked for.

        Raises:
            UserError: a variant is asked for, or the other kind of file.
        """
        if self.variant and not self.or_plain:
            raise UserError(
                f"{path} is one file, and variant={self.variant!r} names one of several in a folder; leave it"
                " out"
            )
        safe = Path(path).suffix.lower() == ".safetensors"
        if self.use_safetensors not in (None, safe):
            raise UserError(
                f"{path} is {'a' if safe else 'no'} safetensors file and"
                f" use_safetensors={self.use_safetensors}; leave that out, or give another file"
            )

    def _kinds(self) -> Iterator[tuple[str | None, str]]:
        """Variants and endings, preferred first."""
        safe, pickles = self.use_safetensors is not False, self.use_safetensors is not True
        if self.variant:
            yield from ((self.variant, ending) for ending in self._endings(safe, pickles))
        if self.variant is None or self.or_plain:
            if safe:
                yield from ((None, ".safetensors"), ("fp16", ".safetensors"))
            if pickles:
                yield (None, ".bin")

    @staticmethod
    def _endings(safe: bool, pickles: bool) -> list[str]:
        return [".safetensors"] * safe + [".bin"] * pickles


def _infix(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _shards(folder: Path, stem: str, variant: str | None, ending: str) -> set[Path]:
    """Parts of one file, under today's names and those of diffusers before 0.29."""
    found = set(folder.glob(f"{stem}{_infix(variant)}-*{ending}"))
    return found | set(folder.glob(f"{stem}-*{_infix(variant)}{ending}"))
