"""Tokenizers of folders. No code of a folder's is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..extras import require_packages
from ..formats.folders import read_json
from .pieces import PIECE_FILES, PieceRules, PieceTokenizer
from .vocabulary import chinese_clip_tokenizer

_WHOLE, _WORDS = "tokenizer.json", "vocab.txt"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a text encoder's folder; Chinese CLIP's where the folder has none of its own.

    SentencePiece's vocabularies of T5's and XLM-R's kind are read by that package itself, and one that lies
    there as ``tokenizer.json`` as that file says; of both transformers makes others.

    Raises:
        UserError: there is none, it is damaged, or it is of no kind that transformers itself has.
    """
    if (folder / _WHOLE).exists():
        return _whole(folder)
    if (folder / _WORDS).exists():
        return _of_transformers(folder)
    if any((folder / name).exists() for name in PIECE_FILES):
        require_packages("a SentencePiece vocabulary")
        rules = PieceRules.read(folder)
        return _of_transformers(folder) if rules is None else PieceTokenizer.from_pretrained(folder, rules)
    if str(read_json(folder / "config.json").get("model_type")).startswith("chinese_clip"):
        return chinese_clip_tokenizer()
    raise UserError(
        f"{folder} holds no tokenizer (tokenizer.json, vocab.txt or spiece.model); save one beside the"
        " weights"
    )


def load_word_pieces(folder: Path) -> Any:
    """BERT's tokenizer in a folder that need not say so (``vocab.txt``).

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not (folder / _WHOLE).exists() and not (folder / _WORDS).exists():
        raise UserError(f"{folder} holds no {_WORDS}; get the folder again")
    from transformers import BertTokenizer

    return _checked(folder, BertTokenizer)


def _whole(folder: Path) -> Any:
    """A tokenizer out of ``tokenizer.json``, which transformers rebuilds by the class named beside it."""
    tokenizer = _of_transformers(folder)
    model = read_json(folder / _WHOLE).get("model")
    if isinstance(model, dict) and model.get("type") == "Unigram":
        from tokenizers import Tokenizer

        tokenizer._tokenizer = Tokenizer.from_file(str(folder / _WHOLE))
    return tokenizer


def _of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return _checked(folder, AutoTokenizer)


def _checked(folder: Path, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each kind has checks and mistakes of its own
        raise UserError(
            f"{folder}: its tokenizer cannot be used ({first_line(error)}); code of the folder's own is"
            " never run: get it again, or save another one beside the weights"
        ) from None
