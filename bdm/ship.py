"""Finished runs -> the weights that are shipped beside the code.

Half precision, a card for each part, nothing of the machine that they were trained on. All parts are made
before the first takes its place.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .assemble import assemble, card_of
from .config import ShipConfig, ShippedModelConfig
from .errors import UserError
from .files import atomic_write, write_json
from .formats.weights import cast, read_json, read_weights

#: Files by which a folder shows that it is a shipped part, which a new one may replace.
_OURS = ("card.json", "scheduler_config.json", "tokenizer_config.json")
#: An absolute path within a text; its last name is kept.
_ABSOLUTE = re.compile(r"(?<![\w.:/@-])/(?:[\w.+@-]+/)+([\w.+@-]+)")


@dataclass(frozen=True)
class Shipped:
    """What was done.

    Attributes:
        sizes: bytes of each part that was shipped, by its place.
        missing: places of the parts whose runs are not finished.
        total: bytes of everything that is shipped now.
        limit: what it may be.
    """

    sizes: Mapping[str, int]
    missing: tuple[str, ...]
    total: int
    limit: float

    def __str__(self) -> str:
        lines = [f"{size / 1e6:8.2f} MB  {place}" for place, size in self.sizes.items()]
        lines += [f"       --     {place}: left out, its run is not finished" for place in self.missing]
        return "\n".join([*lines, f"{self.total / 1e6:8.2f} MB  in all, of {self.limit / 1e6:g} MB"])


def ship(config: ShipConfig, finished: bool = False) -> Shipped:
    """Turn finished runs into shipped weights.

    Args:
        config: which runs, and where they go.
        finished: leave out what is not trained yet.

    Raises:
        UserError: a run that is not finished, a part without a card, a weight that half precision cannot
            hold, a place that holds something else, or more than may be shipped; nothing has changed then.
    """
    wanted = {place: source for place, source in config.parts.items() if not _lacks(source)}
    missing = tuple(place for place in config.parts if place not in wanted)
    if missing and (not finished or not wanted):
        lacking = _lacks(config.parts[missing[0]])
        raise UserError(
            f"{len(missing)} of {len(config.parts)} parts are not trained, such as {missing[0]} ({lacking} is"
            " not there); train them, or ship the others with --finished"
        )
    for place in wanted:
        _refuse_foreign(config.out / place, config.parts[place])
    with tempfile.TemporaryDirectory(prefix="bdm-ship-") as folder:
        made = {
            place: _make(source, Path(folder) / str(i)) for i, (place, source) in enumerate(wanted.items())
        }
        moves = [pair for place, path in made.items() for pair in _moves(path, config.out / place)]
        _refuse_too_much(config, moves)
        for path, place in moves:
            _take_place(path, place)
        sizes = {place: _size(path) for place, path in made.items()}
    return Shipped(sizes, missing, _size(config.out), config.limit_mb * 1e6)


def _refuse_too_much(config: ShipConfig, moves: Sequence[tuple[Path, Path]]) -> None:
    stays = _size(config.out) - sum(_size(place) for _, place in moves)
    total = stays + sum(_size(path) for path, _ in moves)
    if total > config.limit_mb * 1e6:
        raise UserError(
            f"{config.out} would hold {total / 1e6:.1f} MB, and limit_mb is {config.limit_mb:g}; remove"
            " weights that are not needed any more, or leave out parts"
        )


def _take_place(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as partial:
        shutil.copytree(path, partial) if path.is_dir() else shutil.copy(path, partial)


def _lacks(source: str | ShippedModelConfig) -> str:
    """Which of a part's sources is not there; "" where all are."""
    named = (
        [source] if isinstance(source, str) else [source.backbone, source.branch, source.native_text_encoder]
    )
    return next((one for one in named if _is_local(one) and not Path(one).exists()), "")


def _is_local(source: str) -> bool:
    """Whether a source is a path; a pip package's encoder is named by one word."""
    return "/" in source


def _refuse_foreign(place: Path, source: str | ShippedModelConfig) -> None:
    """Refuse to replace a folder that is no shipped part."""
    folder = place if _is_folder(source) else place.parent
    inside = [folder] if isinstance(source, str) else [p for p in folder.glob("*") if p.is_dir()]
    for one in inside:
        if one.exists() and any(one.iterdir()) and not any((one / name).is_file() for name in _OURS):
            raise UserError(
                f"{one} holds files that are no shipped weights, which stay as they are; move them, or give"
                " another place"
            )


def _is_folder(source: str | ShippedModelConfig) -> bool:
    return not isinstance(source, str) or Path(source).is_dir()


def _make(source: str | ShippedModelConfig, folder: Path) -> Path:
    """A part as it is shipped, in a folder of its own."""
    if isinstance(source, ShippedModelConfig):
        assemble(
            source.backbone, source.branch, source.native_text_encoder, folder, torch.float16, False
        )  # fmt: skip
    elif Path(source).is_dir():
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        if card_of(source).is_file():
            shutil.copyfile(card_of(source), folder / "card.json")
    else:
        folder.mkdir()
        shutil.copyfile(source, folder / Path(source).name)
        card = Path(source).with_name("card.json")
        if card.is_file():
            shutil.copyfile(card, folder / card.name)
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            _halve(file, source)
        elif file.suffix == ".json":
            write_json(file, without_machine(read_json(file)))
    for weights in (*folder.rglob("*.safetensors"), *folder.rglob("*.pt")):
        # A connector lies within the text encoder that it was trained with.
        holds = (parent for parent in weights.parents if folder in (parent, *parent.parents))
        if not any((parent / "card.json").is_file() for parent in holds):
            raise UserError(
                f"{source}: there is no card.json beside {weights.name}, which says how it was trained; give"
                " a run's folder"
            )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def _halve(file: Path, source: object) -> None:
    """Store a file's weights in half precision, with what its header says."""
    with safe_open(file, "pt") as opened:
        said = opened.metadata() or {}
    tensors = read_weights(file).tensors
    halves = {
        name: cast(t, torch.float16 if t.is_floating_point() else None, name, source).contiguous()
        for name, t in tensors.items()
    }
    save_file(halves, file, {key: without_machine(text) for key, text in said.items()})


def _moves(made: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """Which made files and folders go where.

    A pipeline's parts each replace their own, so that what is shipped beside them stays. A single file's
    place ends in its name; it goes with its card.
    """
    if (made / "model_index.json").is_file():
        yield from ((path, place / path.name) for path in sorted(made.iterdir()))
    elif place.suffix:
        for path in sorted(made.iterdir()):
            yield path, place.parent / (path.name if path.name == "card.json" else place.name)
    else:
        yield made, place


def without_machine(content: Any) -> Any:
    """The same content without absolute paths: of each, what lies under this folder, or its last name."""
    if isinstance(content, dict):
        return {key: without_machine(value) for key, value in content.items() if key != "_name_or_path"}
    if isinstance(content, list):
        return [without_machine(value) for value in content]
    if not isinstance(content, str):
        return content
    if content.startswith("{"):  # settings within a file's header
        try:
            return json.dumps(without_machine(json.loads(content)))
        except ValueError:
            pass
    return _ABSOLUTE.sub(_relative, content)


def _relative(found: re.Match[str]) -> str:
    path = Path(found[0])
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else found[1]


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0
