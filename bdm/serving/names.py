"""The names of a request -> files of the folders of models, and never a path that somebody sent."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..drawing.known_hashes import known_hash
from ..drawing.library import DEFAULT_MODEL, Library, kind_of
from ..drawing.model_folders import Entry, yaml_folders
from ..drawing.request import FileRef, Mode, PluginUse, Request
from ..errors import UserError, printable
from .uploads import Uploads

#: Annotators that compute alone; the others load weights from the network.
ANNOTATORS = (None, "canny")
#: Endings of files that hold pickles, which no request reaches.
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PATH_SIGNS = ("\\", "\0", "://", "..", "~", "$")


def served_library(folders: Sequence[str | Path] = ()) -> Library:
    """The files that a server offers: what lies inside its folders, itself and not by a link that leads out,
    and holds no pickle.

    Raises:
        UserError: a folder that is not there.
    """
    roots = [os.path.realpath(root) for folder in Library(folders).folders for root in _roots(folder)]
    library = Library(folders, accepts=lambda entry: _is_inside(entry.path, roots) and not _has_pickle(entry))
    list(library)
    return library


def _roots(folder: Path) -> list[Path]:
    listed = folder if folder.suffix.lower() in (".yaml", ".yml") else folder / "extra_model_paths.yaml"
    return [folder, *(place for _, place in yaml_folders(listed))] if listed.is_file() else [folder]


def _is_inside(path: Path, roots: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _has_pickle(entry: Entry) -> bool:
    if entry.path.is_file():
        return entry.path.suffix.lower() in _PICKLES
    return any(path.suffix.lower() in _PICKLES for path in entry.path.rglob("*"))


class Names:
    """Finds what a server's requests name.

    Args:
        library: of ``served_library``.
        uploads: pictures that clients sent.
        model: the pipeline of requests that name none; None for the shipped one.
    """

    def __init__(self, library: Library, uploads: Uploads, model: str | None = None) -> None:
        self.library, self._uploads = library, uploads
        self.model = library.model(model)
        self._lock = threading.Lock()

    def resolved(self, request: Request) -> Request:
        """A request whose files all have their places.

        Args:
            request: as a client gave it; places that it says are not looked at.

        Raises:
            UserError: a name that is none of the folders', or looks like a path; an annotator that would load
                weights.
        """
        with self._lock:
            return replace(
                request,
                model=self._model(request.model),
                branch=request.branch and self._branch(request.branch),
                plugins=tuple(map(self._plugin, request.plugins)),
                mode=self._mode(request.mode),
                beside=tuple(replace(use, file=self._model(use.file)) for use in request.beside),
            )

    def refresh(self) -> None:
        """Look through the folders of models anew."""
        with self._lock:
            self.library.refresh()
            list(self.library)

    def listed(self, said: str, kind: str) -> Path:
        """The file that a client calls by a name, or by the digits of its hash.

        Raises:
            UserError: there is none, or the name looks like a path.
        """
        if said.startswith("/") or any(sign in said for sign in _PATH_SIGNS) or said[1:2] == ":":
            raise UserError(
                f"{kind} {printable(repr(said), 100)} looks like a path; give a name that this server lists"
            )
        found = self.library.listed(said, kind) if said.strip() else None
        if found is None:
            raise UserError(
                f"no {kind} is called {printable(repr(said), 100)}; give a name that this server lists"
            )
        return found

    def start_size(self, request: Request) -> tuple[int, int]:
        """(width, height) of what a resolved request draws where it says none: those of the picture that it
        starts from, or the model's own.
        """
        for role, file in request.mode.pictures:
            if role == "image":
                return self._uploads.size(file.hash)
        return own_size(Path(str((request.model or self.model).source)))

    def _model(self, file: FileRef | None) -> FileRef:
        if file is None or file.hash == self.model.hash or (not file.hash and file.name == self.model.name):
            return self.model
        shipped = self.library.located(FileRef.to(DEFAULT_MODEL), "checkpoint")
        if file.hash == shipped.hash or (not file.hash and file.name == shipped.name):
            return shipped
        found = self._file(file, "checkpoint")
        if not (Path(str(found.source)) / "model_index.json").is_file():
            raise UserError(
                f"model {printable(file.name, 100)} is no folder of a pipeline; give it as a plug-in of kind"
                " checkpoint"
            )
        return found

    def _branch(self, file: FileRef) -> FileRef:
        found = self._file(file, "branch")
        folder = Path(str(found.source))
        if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            raise UserError(f"branch {printable(file.name, 100)} is no folder of a branch or a pipeline")
        return found

    def _file(self, file: FileRef, kind: str) -> FileRef:
        if not file.hash:
            place = self.listed(file.name, kind)
            return FileRef(place.name, known_hash(place, kind), place)
        listed = sorted(self.library, key=lambda entry: entry.path.name != file.name)  # likely ones first
        for entry in listed:
            if (entry.kind or kind_of(entry.path)) in _fitting(kind) and known_hash(
                entry.path, kind
            ) == file.hash:
                return replace(file, source=entry.path)
        raise UserError(f"not here: {kind} {printable(file.name, 100)} (hash {printable(file.hash, 70)})")

    def _plugin(self, plugin: PluginUse) -> PluginUse:
        if plugin.kind == "ip_adapter" or plugin.encoder is not None:
            raise UserError("IP-Adapters are not drawn with by this server; leave them out")
        if plugin.annotator not in ANNOTATORS:
            raise UserError(f"annotator {printable(plugin.annotator, 60)}: this server has canny alone")
        picture = plugin.picture and self._picture(plugin.picture)
        return replace(plugin, file=self._file(plugin.file, plugin.kind), picture=picture)

    def _mode(self, mode: Mode) -> Mode:
        find: dict[str, Callable[[FileRef], FileRef]] = {
            "upscaler": lambda file: self._file(file, "upscaler"),
        }
        pictures = [(role, find.get(role, self._picture)(file)) for role, file in mode.pictures]
        return replace(mode, pictures=tuple(pictures))

    def _picture(self, file: FileRef) -> FileRef:
        return replace(file, source=self._uploads.place(file.hash))


def _fitting(kind: str) -> tuple[str, ...]:
    return (kind, "checkpoint") if kind in ("vae", "branch") else (kind,)


def own_size(pipeline: Path) -> tuple[int, int]:
    """(width, height) of the pictures that a pipeline folder draws where nobody says a size."""
    try:
        latent = json.loads((pipeline / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
        blocks = json.loads((pipeline / "vae" / "config.json").read_text(encoding="utf-8"))
        side = int(latent) * 2 ** (len(blocks["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        side = 512
    return side, side
