"""Native prompts -> English ones, for a backbone that knows no other language: by a table, or by a model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line, printable

logger = logging.getLogger("bdm")

#: P texts -> P texts in English.
Translate = Callable[[Sequence[str]], list[str]]
#: Tokens that a translation model writes at most.
LONGEST = 256


class TableTranslation:
    """Translates what stands in a table and leaves the rest as it is.

    A prompt that is an entry as a whole is taken so; else its longest entries are replaced, from the left.

    Args:
        table: English by native text.
        joiners: what stands between entries, and what in its place in English.
    """

    def __init__(self, table: Mapping[str, str], joiners: Mapping[str, str] | None = None) -> None:
        self._table = {**table, **(joiners or {})}
        longest = sorted(self._table, key=len, reverse=True)
        self._entry = re.compile("|".join(map(re.escape, longest))) if longest else re.compile(r"(?!)")

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The texts in English; texts in which nothing is known are counted in a warning."""
        unknown = [text for text in texts if text and not self._entry.search(text)]
        if unknown:
            logger.warning(
                "%d of %d prompts stand nowhere in the table, the first %r; they stay as they are",
                len(unknown), len(texts), unknown[0][:60],
            )  # fmt: skip
        return [self._table.get(text) or self._entry.sub(self._english, text) for text in texts]

    def _english(self, found: re.Match[str]) -> str:
        return self._table[found[0]]


class ModelTranslation:
    """Translates with a model of transformers that turns one text into another (Marian, M2M100, T5 ...).

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The texts in English, as the model's own settings decode them; "" stays ""."""
        said = [text for text in texts if text]
        if not said:
            return [*texts]
        tokens = self._tokenizer(said, return_tensors="pt", padding=True, truncation=True)
        ids = self._model.generate(**tokens.to(self._model.device), max_new_tokens=LONGEST)
        english = iter(self._tokenizer.batch_decode(ids, skip_special_tokens=True))
        return [next(english).strip() if text else "" for text in texts]


def read_translation(source: str | Path) -> Translate:
    """A table (``.tsv``: native text, a tab, English; ``.json``: one object) or a translation model's folder.

    Nothing is fetched, and no code of a folder's own is run.

    Raises:
        UserError: there is none, or it is of no such form.
    """
    path = Path(source)
    if path.is_dir():
        return _read_model(path)
    if not path.is_file():
        raise UserError(
            f"{printable(source, 300)}: no such file or folder; give a table (.tsv, .json) or a model"
        )
    return TableTranslation(_read_json(path) if path.suffix.lower() == ".json" else _read_tsv(path))


def _read_tsv(path: Path) -> dict[str, str]:
    table = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        native, tab, english = line.partition("\t")
        if not tab or not native.strip() or not english.strip():
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not a text, a tab and its English; mend it"
            )
        table[native.strip()] = english.strip()
    return _some(table, path)


def _read_json(path: Path) -> dict[str, str]:
    try:
        said = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({first_line(error)}); mend it") from None
    if not isinstance(said, dict) or not all(isinstance(english, str) for english in said.values()):
        raise UserError(f"{path} is not one object of texts and their English; mend it")
    return _some({native: english for native, english in said.items() if native}, path)


def _some(table: dict[str, str], path: Path) -> dict[str, str]:
    if not table:
        raise UserError(f"{path} holds no translations; give a table of at least one")
    return table


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); save it as UTF-8") from None


def _read_model(folder: Path) -> ModelTranslation:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # each model has checks and mistakes of its own
        raise UserError(
            f"{folder} holds no translation model that can be read ({first_line(error)}); give one of"
            " transformers' that turns texts into texts"
        ) from None
    return ModelTranslation(model, tokenizer)
