"""Folders of models: where they lie, which of their files hold weights, what their JSON says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line, printable, refused_paths
from ..shipped import find_path
from .choice import FileChoice

#: Safetensors before pickles, full precision before half.
ANY_FILES = FileChoice()


def resolve_folder(
    source: str | Path,
    subfolder: str | None = None,
    files: list[str] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Path:
    """A local model folder for a path, the name of a shipped one (``assets/emoji``) or a hub name.

    The hub's are downloaded through ``huggingface_hub``; HF_ENDPOINT is honoured.

    Args:
        source: folder or hub name.
        subfolder: folder inside it.
        files: patterns of the files that are wanted of a hub's model, such as ``["*.json"]``; all if None.
        hub: what ``huggingface_hub.snapshot_download`` is told besides, such as ``local_files_only``.

    Raises:
        UserError: a file, a folder that is not there, or a name that the hub does not give.
    """
    with refused_paths(source):
        path = find_path(source)
    shown = printable(source, 300)
    if not os.path.isdir(path):  # which takes names of any length
        if os.path.isfile(path):
            raise UserError(f"{shown} is a file; give the folder that holds config.json and the weights")
        if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) != 2:
            raise UserError(
                f"{shown}: no such folder; give a local folder or a hub name of the form owner/model"
            )
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(source), allow_patterns=files, **(hub or {})))
        except Exception as error:  # offline, unknown name, no permission: one line for each
            raise UserError(
                f"{shown}: neither a local folder nor a model the hub gives ({type(error).__name__}); "
                "give a local folder, or set HF_ENDPOINT to a mirror"
            ) from None
    return path / subfolder if subfolder else path


def weight_files(folder: Path, choice: FileChoice = ANY_FILES) -> list[Path]:
    """The files that a folder's weights are read from: the preferred whole one, else its shards.

    None if it holds none.
    """
    return choice.find(folder)[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); get the folder again") from None
    return json_object(text, path)


def json_object(text: str, what: object) -> dict[str, Any]:
    """A JSON object out of a file or a header.

    Args:
        text: JSON.
        what: for messages.

    Raises:
        UserError: not JSON, nested too deep, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read as JSON ({first_line(error)}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} holds a JSON {type(content).__name__}, not an object; get it again")
    return content
