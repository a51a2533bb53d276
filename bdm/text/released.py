"""The text encoders of released systems, as their own pipelines call them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..formats.choice import FileChoice
from ..formats.systems import ReleasedSystem
from .encoders import load_encoder
from .pieces import PIECE_FILES, PieceRules, PieceTokenizer
from .tokenizers import load_tokenizer, load_word_pieces

#: Where a folder says no number of positions, transformers says this or more.
_UNSAID = 100_000


def load_released(
    folder: Path, system: ReleasedSystem, files: FileChoice
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The native text encoder in a released system's folder.

    Args:
        folder: the system's.
        system: which it is.
        files: which of a folder's files.

    Returns:
        Text encoder, tokenizer, and the ``NativeTextSettings`` with which features are those of the system's
        own pipeline: one chunk, padded to its full length, brackets read as text.

    Raises:
        UserError: files that are missing, damaged or do not belong together.
    """
    model = load_encoder(folder / "text_encoder", files)
    tokenizer = _tokenizer(folder / "tokenizer", system)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder / 'tokenizer'} names no padding token; get the folder again")
    said = tokenizer.model_max_length
    length = system.positions if system.fixed or not said or said >= _UNSAID else int(said)
    config: Any = model.config
    if config.model_type == "clip_text_model":
        length = min(length, config.max_position_embeddings)
    settings = {
        "mask": system.mask and getattr(config, "use_attention_mask", True),
        "chunk_length": length - len(tokenizer("").input_ids),
        "max_chunks": 1,
        "lower_case": system.lower_case,
        "brackets": False,
    }
    return model, tokenizer, settings


def _tokenizer(folder: Path, system: ReleasedSystem) -> Any:
    if system.cutter == "word pieces":
        return load_word_pieces(folder)
    file = next((name for name in PIECE_FILES if (folder / name).is_file()), None)
    if (folder / "tokenizer.json").is_file() or file is None:
        return load_tokenizer(folder)
    rules = PieceRules.read(folder) or PieceRules()
    return PieceTokenizer.from_pretrained(folder, dataclasses.replace(rules, fairseq=file == PIECE_FILES[1]))
