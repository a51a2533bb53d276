"""``info`` and ``models``: what is written in pictures, and what lies in folders of models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from .columns import columns
from .language import told
from .quiet import quiet


def add_commands(commands: Any) -> None:
    """Add ``info`` and ``models`` to a parser's commands."""
    info = commands.add_parser("info", help="say how pictures were drawn, by what is written in them")
    info.add_argument("files", nargs="+", type=Path, metavar="PICTURE", help=".png, .jpg or .webp")
    info.add_argument("--json", action="store_true", help="the whole request as JSON, one on a line")
    info.set_defaults(run=_info)

    models = commands.add_parser(
        "models", help="list the files in folders of models: kind, base, trigger words, hash, preview"
    )
    models.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="as --models of infer; those of BDM_MODELS besides"
    )
    models.add_argument("--kind", help="only this: checkpoint, vae, adapter, controlnet, embedding, upscaler")
    models.add_argument("--json", action="store_true", help="as JSON, one on a line")
    models.set_defaults(run=_models)


def _info(options: argparse.Namespace) -> None:
    import json

    failed: list[str] = []
    for i, path in enumerate(options.files):
        try:
            lines = [json.dumps(_plain(path), ensure_ascii=False)] if options.json else _shown(path)
        except UserError as error:
            failed.append(str(error))
            continue
        print(*([] if options.json else [*([""] if i else []), printable(path)]), *lines, sep="\n")
    if failed:
        raise UserError("; ".join(failed))


def _plain(path: Path) -> dict[str, Any]:
    """A picture's request; of A1111's text what it is read as, and what is not read."""
    from ..drawing.picture_reading import picture_request, picture_texts

    parameters, said = picture_texts(path)
    if said or not parameters:
        return picture_request(path).to_json()
    read = _read(parameters)
    rest = {name: list(getattr(read, name)) for name in ("unknown", "missing", "lacks", "notes")}
    return {"request": read.request.to_json(), **rest}


def _read(parameters: str) -> Any:
    from ..drawing.a1111_request import read_a1111
    from ..drawing.library import Library

    return read_a1111(parameters, Library())


def _shown(path: Path) -> list[str]:
    """The lines of a picture.

    Raises:
        UserError: it says nothing, or what cannot be read.
    """
    from ..drawing.picture_reading import picture_graph, picture_texts

    parameters, said = picture_texts(path)
    lines = [f"  {printable(line)}" for line in parameters.split("\n") if line]
    if said:
        return lines + _own_lines(path)
    if parameters:
        return lines + _other_lines(parameters)
    graph = picture_graph(path)
    if not graph:
        raise UserError(f"{path} says nothing of how it was made")
    return _graph_lines(graph)


def _other_lines(parameters: str) -> list[str]:
    """What becomes of A1111's text."""
    read = _read(parameters)
    lines = [told("without the JSON of bdm: --from draws it as far as A1111's text tells")]
    lines += [told(f"not drawn here: {printable(one, 200)}") for one in read.unknown]
    lines += [told(f"not here: {printable(one, 200)}") for one in read.missing]
    lines += [told(f"needs --{option}, which no text holds") for option in read.lacks]
    lines += [told(note) for note in read.notes]
    return [f"  {line}" for line in lines]


def _graph_lines(graph: str) -> list[str]:
    from ..drawing.comfy_graph import graph_lines

    lines = [printable(line) for line in graph_lines(graph)]
    return [f"  {line}" for line in [*lines, told("drawn by ComfyUI: its graph is not drawn here")]]


def _own_lines(path: Path) -> list[str]:
    from ..drawing.picture_reading import picture_request

    lines: list[str] = []
    request = picture_request(path)
    for file in request.files():
        lines.append(f"  {told(f'needs {printable(file.name)} (hash {file.hash})')}")
    versions = request.versions
    drawn = f"torch {versions.torch}, diffusers {versions.diffusers}, transformers {versions.transformers}"
    drawn = f"drawn by bdm {versions.bdm} with {drawn} on {printable(versions.device)}"
    return [*lines, f"  {told(drawn)}"]


def _models(options: argparse.Namespace) -> None:
    import json

    from ..drawing.library import Library
    from ..drawing.model_list import COLUMNS, list_models

    quiet()
    library = Library(options.folders)
    if not library.has_folders:
        raise UserError("no folder of models is given; give one, or name some in BDM_MODELS")
    found = [model for model in list_models(library) if options.kind in (None, model["kind"])]
    if options.json:
        for model in found:
            print(json.dumps(model, ensure_ascii=False))
        return
    titles = [told(f"column: {name}").removeprefix("column: ") for name in COLUMNS]
    rows = [titles, *([printable(model[name], 60) for name in COLUMNS] for model in found)]
    widths = [max(columns(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text + " " * (width - columns(text)) for text, width in zip(row, widths)).rstrip())
