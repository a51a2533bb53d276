"""Finds the files that requests need: by path, stem, alias or hash."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, printable
from ..formats.header import read_header
from ..formats.identify import identify_source
from ..formats.weights import WEIGHT_SUFFIXES, resolve_folder
from ..shipped import find_path, shipped
from .known_hashes import is_picture_of, known_hash, known_hashes, picture_hash
from .model_folders import Entry, check_there, entries
from .picture_names import ENDINGS
from .request import FileRef

#: The pipeline that draws where no other is named.
DEFAULT_MODEL = shipped("assets/emoji")
_HASH = re.compile(r"[0-9a-fA-F]{8,64}")
#: Files that pictures are looked for among, at most.
_MOST_PICTURES = 5000


class Library:
    """The files of a machine that requests may need.

    Args:
        folders: of community files (see ``bdm.drawing.model_folders.entries``); BDM_MODELS names some too.
        beside: folders that are looked through for pictures and files as well, without what is in them.
        accepts: whether something that lies in the folders is listed at all.

    Raises:
        UserError: a folder that is not there.
    """

    def __init__(
        self,
        folders: Sequence[str | Path] = (),
        beside: Sequence[str | Path] = (),
        accepts: Callable[[Entry], bool] = lambda entry: True,
    ) -> None:
        more = filter(None, os.environ.get("BDM_MODELS", "").split(os.pathsep))
        self._folders = [Path(os.path.expanduser(folder)) for folder in (*folders, *more)]
        for folder in self._folders:
            check_there(folder)
        self._beside = [Path(folder) for folder in beside]
        self._accepts = accepts
        self._entries: list[Entry] | None = None
        self._located: dict[tuple[FileRef, Path | None, str], FileRef] = {}

    def __iter__(self) -> Iterator[Entry]:
        """What lies in the folders, each once.

        Raises:
            UserError: a folder that is not there.
        """
        if self._entries is None:
            found = [e for folder in self._folders for e in entries(folder) if self._accepts(e)]
            self._entries = list({os.path.realpath(entry.path): entry for entry in found[::-1]}.values())[
                ::-1
            ]
        return iter(self._entries)

    def refresh(self) -> None:
        """Look through the folders anew when something is asked for next."""
        self._entries = None
        self._located = {}

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that are looked through, those of BDM_MODELS among them."""
        return tuple(self._folders)

    @property
    def has_folders(self) -> bool:
        """Whether any folder is looked through."""
        return bool(self._folders)

    def find(self, said: str, kind: str) -> Path:
        """What somebody calls a file.

        Args:
            said: a path, or of a file in the folders its name with or without ending, its alias (the name
                that its trainer noted), or the first eight digits or more of its hash.
            kind: of plug-in.

        Returns:
            The file or folder; ``said`` as a path where nothing has that name, so that whoever opens it says
            what is wrong.

        Raises:
            UserError: several have the name; none has, and others nearly do.
        """
        if os.path.exists(find_path(said)) or not self._folders:
            return Path(said)
        found = self.listed(said, kind)
        if found is not None:
            return found
        among = [entry for entry in self if self._may_be(entry, kind)]
        near = difflib.get_close_matches(said, [entry.path.stem for entry in among], n=3)
        if Path(said).suffix or len(Path(said).parts) > 1 or not near:
            return Path(said)
        raise UserError(f"no {kind} is called {printable(said, 100)}; near it are {', '.join(near)}")

    def listed(self, said: str, kind: str) -> Path | None:
        """What lies in the folders under a name, alias or hash; None for nothing.

        Raises:
            UserError: several that differ have the name.
        """
        among = [entry for entry in self if self._may_be(entry, kind)]
        for called in (_is_named, _is_aliased, _has_hash):
            found = [entry.path for entry in among if called(entry, said)]
            if len(found) > 1 and len({known_hash(path, kind) for path in found}) > 1:
                several = ", ".join(printable(path, 200) for path in found[:5])
                raise UserError(f"{printable(said, 100)} may be {several}; say more of its path, or its hash")
            if found:
                return found[0]
        return None

    def by_digits(self, name: str, digits: str, kind: str) -> Path | None:
        """What has a hash that begins with some digits, of whichever kind of hash; None for nothing.

        Args:
            name: what it may be called; files of that name are looked at first.
            digits: eight or more.
            kind: of plug-in.
        """
        if not _HASH.fullmatch(digits):
            return None
        candidates = self._candidates(name, kind)
        return next((place for place in candidates if _begins_with(place, digits)), None)

    def model(self, said: str | Path | None) -> FileRef:
        """The pipeline of a name: a folder, a hub's name, one of the folders of models; None for ours."""
        if said is None:
            return replace(self.located(FileRef.to(DEFAULT_MODEL), "checkpoint"), name="emoji")
        found = self.find(str(said), "checkpoint")
        return self.located(FileRef.to(found), "checkpoint")

    def located(self, file: FileRef, kind: str) -> FileRef:
        """A reference with its hash and its place on this machine.

        Args:
            file: by its place, or else by its hash or name.
            kind: of plug-in, or "picture".

        Raises:
            UserError: it is not here, or its place holds another file.
        """
        key = (file, file.source, kind)
        if key not in self._located:
            self._located[key] = self._locate(file, kind)
        return self._located[key]

    def _locate(self, file: FileRef, kind: str) -> FileRef:
        if kind == "picture":
            return self._picture(file)
        if file.source is not None:
            place = _place(file.source)
            return replace(file, source=place, hash=known_hash(place, kind))
        if not file.hash:
            place = self.find(file.name, kind)
            return self._locate(replace(file, source=place), kind)
        for place in self._candidates(file.name, kind):
            if known_hash(place, kind) == file.hash:
                return replace(file, source=place)
        raise UserError(f"{kind} {printable(file.name, 200)} (hash {file.hash})")

    def _candidates(self, name: str, kind: str) -> Iterator[Path]:
        """Where a file may lie, those of its name first."""
        beside = [folder / name for folder in self._beside]
        named = [DEFAULT_MODEL, *beside, Path(name)] if kind == "checkpoint" else [*beside, Path(name)]
        yield from (path for path in named if os.path.exists(path) and _is_model(path))
        listed = [entry for entry in self if self._may_be(entry, kind)]
        listed.sort(key=lambda entry: entry.path.name != name)
        yield from (entry.path for entry in listed)
        for folder in self._beside:
            yield from (entry.path for entry in entries(folder))

    def _picture(self, file: FileRef) -> FileRef:
        if file.source is not None:
            return replace(file, hash=file.hash or picture_hash(file.source))
        folders = [Path(), *self._beside]
        named = [folder / file.name for folder in folders]
        others = (path for folder in folders for path in _pictures(folder))
        for path in [*named, *others]:
            if path.is_file() and (is_picture_of(path, file.hash) if file.hash else path in named):
                return replace(file, source=path, hash=file.hash or picture_hash(path))
        raise UserError(f"picture {printable(file.name, 200)} (hash {file.hash or 'unknown'})")

    def _may_be(self, entry: Entry, kind: str) -> bool:
        """Whether an entry may be of a kind: its folder says so, or itself where that says nothing."""
        more = {
            "vae": ("checkpoint",),
            "branch": ("checkpoint",),
            "ip_adapter": ("other", "unknown"),
            "image_encoder": ("other", "unknown"),
        }
        return (entry.kind or kind_of(entry.path)) in (kind, *more.get(kind, ()))


def _place(source: Path) -> Path:
    """Where a file or folder lies; a hub's model is got.

    Raises:
        UserError: there is none.
    """
    if os.path.isfile(source):  # which takes names of any length
        return source
    if source.suffix.lower() in WEIGHT_SUFFIXES and not os.path.isdir(source):
        raise UserError(f"{printable(source, 300)}: no such file; check the path")
    return resolve_folder(str(source))


def kind_of(path: Path) -> str:
    """What a file or folder is; "other" for what cannot be told."""
    try:
        return identify_source(path).kind
    except (UserError, OSError):
        return "other"


def _is_model(path: Path) -> bool:
    return path.is_file() or (path / "model_index.json").is_file() or (path / "config.json").is_file()


def _pictures(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in ENDINGS]
    except OSError:
        return []
    return sorted(found)[:_MOST_PICTURES]


def _is_named(entry: Entry, said: str) -> bool:
    names = (entry.path.name, entry.path.stem, entry.path.as_posix()[-len(said) - 1 :].removeprefix("/"))
    return said.lower() in [name.lower() for name in names]


def _is_aliased(entry: Entry, said: str) -> bool:
    """Whether a trainer noted this name in the file."""
    if entry.path.suffix.lower() != ".safetensors":
        return False
    try:
        noted = read_header(entry.path).metadata
    except UserError:
        return False
    return said.lower() in (noted.get(key, "").lower() for key in ("ss_output_name", "modelspec.title"))


def _has_hash(entry: Entry, said: str) -> bool:
    return bool(_HASH.fullmatch(said)) and _begins_with(entry.path, said)


def _begins_with(path: Path, digits: str) -> bool:
    return any(found.startswith(digits.lower()) for found in known_hashes(path).values())
