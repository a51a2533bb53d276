"""A SentencePiece vocabulary out of training captions, as Japanese Stable Diffusion has one of its own.

Kudo and Richardson, "SentencePiece" (arXiv 1808.06226), with a unigram model (arXiv 1804.10959).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from ..config import VocabularyConfig
from ..data.source import Source, UnreadableExample
from ..errors import UserError, first_line
from ..extras import import_extra
from ..files import atomic_write, refuse_occupied
from ..text.pieces import PieceRules, PieceTokenizer
from ..text.vocabulary import clip_tokenizer
from ..training.recipes.build import build_source
from .vocabulary_report import Counts, count_tokens, write_report

#: T5's order of ids, which needs no table beside the file; case folding lies in the file, not beside it.
_RULES = dict(
    model_type="unigram",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    normalization_rule_name="nmt_nfkc_cf",
    character_coverage=1.0,
    hard_vocab_limit=False,
)
#: With several threads the sums of the training would depend on who comes first; longer lines, and lines
#: beyond a number, would be left out without a word.
_ALL_OF_IT = dict(num_threads=1, max_sentence_length=1 << 24, input_sentence_size=0, minloglevel=2)


def make_vocabulary(config: VocabularyConfig) -> str:
    """Train a vocabulary and write it with a report into a new folder, whole or not at all.

    Returns:
        The report.

    Raises:
        UserError: the folder is not empty, there are no captions, or fewer pieces than characters.
    """
    refuse_occupied(config.out)
    source = build_source(config.data)
    captions = training_captions(source)
    rules = PieceRules(positions=config.positions)
    tokenizer = PieceTokenizer(train_pieces(captions, config.pieces), rules, "the trained vocabulary")
    counted = {"training": captions, "validation": _captions(source.validation)}
    clip = clip_tokenizer(config.positions)
    counts: dict[str, tuple[Counts, Counts]] = {
        part: (
            count_tokens(texts, tokenizer.content, tokenizer.unk_token_id),
            count_tokens(texts, lambda text: clip(text, add_special_tokens=False, verbose=False).input_ids),
        )
        for part, texts in counted.items()
        if texts
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.out) as folder:
        tokenizer.save_pretrained(folder)
        return write_report(counts, len(tokenizer), Path(folder), config.positions)


def training_captions(source: Source) -> list[str]:
    """All captions that a run on this data may draw, in the data's order.

    Raises:
        UserError: these are the examples that training never sees, or none has a caption.
    """
    if _same_examples(source, source.validation):
        raise UserError(
            "these are the validation captions, which no vocabulary is trained on: it would know what"
            " training never sees; give the data they were kept from"
        )
    captions = _captions(source)
    if not captions:
        raise UserError(f"none of {len(source)} examples has a caption; a vocabulary is made of captions")
    return captions


def _captions(source: Source) -> list[str]:
    """The captions of a source; examples without one, as in training, are left out."""
    found: list[str] = []
    every = getattr(source, "captions", lambda index: [source.caption(index)])
    for index in range(len(source)):
        try:
            found += every(index)
        except UnreadableExample:
            continue
    return found


def _same_examples(source: Source, other: Source) -> bool:
    """Whether a source is its own validation part."""
    if len(source) != len(other):
        return False
    name = getattr(source, "key", source.caption)
    return all(name(i) == getattr(other, "key", other.caption)(i) for i in range(len(source)))


def train_pieces(captions: Iterable[str], pieces: int) -> bytes:
    """A unigram vocabulary; the same captions in the same order give the same bytes.

    Args:
        captions: texts; every character of theirs becomes a piece.
        pieces: how many there are at most, the three markers among them.

    Returns:
        The SentencePiece file: ids in T5's order (padding 0, end 1, unknown 2), texts normalised by NFKC with
        letters folded to lower case.

    Raises:
        UserError: no captions, or fewer pieces than characters.
    """
    trainer = import_extra("a SentencePiece vocabulary").SentencePieceTrainer
    written = io.BytesIO()
    # The trainer reads lines.
    lines = (" ".join(caption.split()) for caption in captions)
    try:
        trainer.train(
            sentence_iterator=iter([line for line in lines if line]),
            model_writer=written,
            vocab_size=pieces,
            **_RULES,
            **_ALL_OF_IT,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no vocabulary of {pieces} pieces can be made of these captions ({_reason(error)}); give more"
            " pieces, or more captions"
        ) from None
    return written.getvalue()


def _reason(error: Exception) -> str:
    """What SentencePiece says, without the place in its code."""
    return first_line(error).rpartition("] ")[2] or first_line(error)
