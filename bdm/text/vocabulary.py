"""Tokenizers of CLIP and Chinese CLIP, with the vocabularies that pip packages carry.

No network, nothing committed.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line, printable
from ..extras import package_file
from ..formats.folders import read_json

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizer

#: Merges that CLIP's BPE keeps of the file: 49152 tokens less the 2 x 256 byte tokens and the two markers.
_CLIP_MERGES = 49152 - 256 - 2
#: What begins and ends a text.
_MARKERS = ("<|startoftext|>", "<|endoftext|>")


@cache
def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = package_file("CLIP's vocabulary", "open_clip", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : _CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + [*_MARKERS]
    return {token: i for i, token in enumerate(tokens)}, merges  # pyright: ignore[reportReturnType]


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """CLIP's BPE tokenizer (49,408 tokens) from the ``open_clip_torch`` package.

    ``length`` counts both markers.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=length)  # pyright: ignore[reportArgumentType]


def chinese_clip_tokenizer() -> BertTokenizer:
    """Chinese CLIP's BERT tokenizer (21,128 tokens, lower-casing) from the ``cn_clip`` package."""
    from transformers import BertTokenizer

    file = package_file("Chinese CLIP's vocabulary", "cn_clip", "clip/vocab.txt")
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return BertTokenizer(vocab={token: i for i, token in enumerate(lines)}, do_lower_case=True)


def read_clip_tokenizer(folder: Path, rows: int | None = None, positions: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer in a model's folder; the one that a pip package carries where the folder has none.

    Args:
        folder: of the tokenizer.
        rows: of the text encoder's token table, which must be as many as there are tokens; None leaves it
            unchecked.
        positions: tokens that the text encoder reads at once, both markers counted.

    Raises:
        UserError: the vocabulary is damaged, incomplete, or another text encoder's.
    """
    whole, tokens, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.exists() and not tokens.exists():
        tokenizer = clip_tokenizer(positions)
        if rows not in (None, len(tokenizer)):
            raise UserError(
                f"{folder} holds no vocabulary of CLIP's (vocab.json), and the text encoder knows {rows}"
                f" tokens where CLIP's own vocabulary has {len(tokenizer)}; get both of one model"
            )
        return tokenizer
    if whole.exists():
        _check_whole(whole)
    if tokens.exists():
        _check_vocabulary(read_json(tokens), _merges_of(merges), tokens)
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ends = tokenizer("").input_ids
    except Exception as error:  # two libraries, each with checks and mistakes of its own
        raise UserError(
            f"{folder}: its tokenizer cannot be used ({first_line(error)}); get it again"
        ) from None
    if len(ends) != 2 or rows not in (None, len(tokenizer)):
        raise UserError(
            f"{folder}: its tokenizer knows {len(tokenizer)} tokens and ends texts with {len(ends) - 1} of"
            f" them, and the text encoder knows {rows} and reads 1; get both of one model"
        )
    if tokenizer.model_max_length > positions:  # where the folder says nothing, it has no limit
        tokenizer.model_max_length = positions
    return tokenizer


def _check_whole(path: Path) -> None:
    """Refuse a tokenizer in one file whose vocabulary is not CLIP's kind."""
    model = read_json(path).get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("dropout"):
        raise UserError(f"{path} describes no tokenizer of CLIP's (model of the type BPE); get it again")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise UserError(f"{path} holds no merges; get it again")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    _check_vocabulary(model.get("vocab"), pairs, path)


def _merges_of(path: Path) -> list[list[str]]:
    """The pairs that are merged, as CLIP's file lists them."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); get the folder again") from None
    return [line.split() for line in lines if line.strip() and not line.startswith("#version")]


def _check_vocabulary(vocabulary: Any, merges: Sequence[Any], path: Path) -> None:
    """Refuse a vocabulary that is not whole: numbered throughout, and its tokens those that the merges make.

    Raises:
        UserError: says what is wrong.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise UserError(f"{path} names no tokens with their numbers; get it again")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{path}: its {len(vocabulary)} tokens are not numbered one by one; get it again")
    pairs = [pair for pair in merges if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(merges) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UserError(f"{path.parent}: not all of its merges are pairs of tokens; get it again")
    made = {"".join(pair) for pair in pairs}
    symbols = set(bytes_to_unicode().values())
    known = made | symbols | {f"{symbol}</w>" for symbol in symbols} | set(_MARKERS)
    for what, left in (
        ("makes", made - vocabulary.keys()),
        ("does not make", vocabulary.keys() - known),
        ("lacks", set(_MARKERS) - vocabulary.keys()),
    ):
        if left:
            raise UserError(
                f"{path}: tokens and merges do not belong together, one of which {what}"
                f" {printable(min(left), 60)!r} ({len(left)} such); get the folder again"
            )
