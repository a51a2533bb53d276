"""SentencePiece vocabularies, cut exactly as the ``sentencepiece`` package cuts.

transformers rebuilds such a file as a tokenizer of its own, and says nothing of what it leaves out: the
unknown id, lower-casing, byte fallback, ``add_dummy_prefix``, BPE's order of merges. Here the package itself
reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..extras import import_extra
from ..formats.folders import read_json

#: T5's file, and XLM-R's.
PIECE_FILES = ("spiece.model", "sentencepiece.bpe.model")
#: What says of a folder's tokenizer which class it is.
CONFIG_FILE = "tokenizer_config.json"
#: fairseq, and XLM-R after it, numbers these first and moves the file's own pieces by one.
_FAIRSEQ = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


@dataclass(frozen=True)
class PieceRules:
    """What a folder says of its vocabulary beside the file.

    Attributes:
        fairseq: ids as in XLM-R: ``<s>`` in front, ``</s>`` behind, pieces moved by one. Otherwise as in T5:
            the file's own ids, and ``</s>`` behind.
        lower_case: lower-case a text first, as Python does.
        positions: tokens of a text at most, markers counted; 0 for any number.
        pad_token: the piece that fills the rest. One that the file does not hold is its unknown piece, as
            T5's tokenizer has it.
        end_token: the piece behind every text.
    """

    fairseq: bool = False
    lower_case: bool = False
    positions: int = 0
    pad_token: str = "<pad>"
    end_token: str = "</s>"

    @property
    def file_name(self) -> str:
        """What the vocabulary's file is called in a folder."""
        return PIECE_FILES[self.fairseq]

    @staticmethod
    def read(folder: Path) -> PieceRules | None:
        """The rules of a tokenizer's folder; None where its class is neither T5's nor XLM-R's.

        Raises:
            UserError: its settings cannot be read.
        """
        path = folder / CONFIG_FILE
        said = read_json(path) if path.is_file() else {}
        named = folder / "special_tokens_map.json"
        tokens = (read_json(named) if named.is_file() else {}) | said
        kind = str(said.get("tokenizer_class") or _class_by_file(folder)).removesuffix("Fast")
        if kind not in ("T5Tokenizer", "XLMRobertaTokenizer"):
            return None
        positions = said.get("model_max_length")
        return PieceRules(
            kind == "XLMRobertaTokenizer",
            said.get("do_lower_case") is True,
            positions if isinstance(positions, int) and 0 < positions < 100_000 else 0,
            _token(tokens.get("pad_token"), "<pad>"),
            _token(tokens.get("eos_token"), "</s>"),
        )


def _class_by_file(folder: Path) -> str:
    """The class that a folder means which names none: by its file, and the model's type where both lie."""
    kind = "T5Tokenizer" if (folder / PIECE_FILES[0]).is_file() else "XLMRobertaTokenizer"
    config = folder / "config.json"
    model = read_json(config).get("model_type") if config.is_file() else None
    known = {"T5Tokenizer": ("t5", "mt5", "umt5", "clip_text_model"), "XLMRobertaTokenizer": ("xlm-roberta",)}
    return kind if model is None or model in known[kind] else ""


def _token(value: Any, default: str) -> str:
    """A token, which transformers writes as a text or as a mapping with its ``content``."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else default


class PieceTokenizer:
    """Texts -> ids of pieces, with the interface of transformers' tokenizers that text encoders use.

    What looks like a marker in a text (``</s>``) is cut like any other text.

    Args:
        model: the bytes of a SentencePiece file.
        rules: what is said beside it.
        source: for messages.

    Raises:
        UserError: these are no such bytes, or the sentencepiece package is missing.
    """

    def __init__(self, model: bytes, rules: PieceRules | None = None, source: object = "the vocabulary"):
        self.rules = rules or PieceRules()
        self._model = model
        self._pieces = _read(model, source)
        self._unknown: int = self._pieces.unk_id()
        self.pad_token_id = self.id_of(self.rules.pad_token)
        self.eos_token_id = self.id_of(self.rules.end_token)
        self.unk_token_id = self._moved(self._unknown)
        self.model_max_length = self.rules.positions or int(1e30)

    @classmethod
    def from_pretrained(cls, folder: str | Path, rules: PieceRules | None = None) -> PieceTokenizer:
        """Read a folder's vocabulary.

        Args:
            folder: holds ``spiece.model`` or ``sentencepiece.bpe.model``.
            rules: instead of those that lie beside it.

        Raises:
            UserError: no such file, one that is none, or a tokenizer of another class.
        """
        rules = rules or PieceRules.read(Path(folder))
        if rules is None:
            raise UserError(f"{folder} holds a tokenizer that is neither T5's nor XLM-R's; give one of them")
        path = Path(folder) / rules.file_name
        try:
            return cls(path.read_bytes(), rules, path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); get the folder again") from None

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write the vocabulary, byte for byte as it was read, and what is said beside it."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        said = {
            "tokenizer_class": "XLMRobertaTokenizer" if self.rules.fairseq else "T5Tokenizer",
            "do_lower_case": self.rules.lower_case,
            "model_max_length": self.rules.positions or None,
            "pad_token": self.rules.pad_token,
            "eos_token": self.rules.end_token,
        }
        written = (place / self.rules.file_name, place / CONFIG_FILE)
        written[0].write_bytes(self._model)
        written[1].write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        return tuple(map(str, written))

    def __len__(self) -> int:
        # XLM-R's mask stands behind the pieces.
        return self._pieces.get_piece_size() + 2 * self.rules.fairseq

    @property
    def vocab_size(self) -> int:
        """Ids that texts can have."""
        return len(self)

    def get_vocab(self) -> dict[str, int]:
        """The ids of all pieces."""
        return {piece: self.id_of(piece) for piece in self._pieces.id_to_piece(list(range(self._count)))}

    @property
    def _count(self) -> int:
        return self._pieces.get_piece_size()

    def id_of(self, piece: str) -> int:
        """The id of a piece; the unknown one's where there is no such piece."""
        if self.rules.fairseq and piece in _FAIRSEQ:
            return _FAIRSEQ[piece]
        return self._moved(self._pieces.piece_to_id(piece))

    def _moved(self, number: int) -> int:
        if not self.rules.fairseq:
            return number
        return _FAIRSEQ["<unk>"] if number == self._unknown else number + 1

    def content(self, text: str) -> list[int]:
        """The ids of a text, without markers."""
        text = text.lower() if self.rules.lower_case else text
        return [self._moved(number) for number in self._pieces.encode(text)]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The text of ids; markers say nothing."""
        markers = {self.pad_token_id, self.eos_token_id} | ({0, 1, 2} if self.rules.fairseq else set())
        own = [self._own(int(number)) for number in ids if int(number) not in markers]
        return self._pieces.decode([number for number in own if 0 <= number < self._count])

    def _own(self, number: int) -> int:
        if not self.rules.fairseq:
            return number
        return self._unknown if number == _FAIRSEQ["<unk>"] else number - 1

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> Any:
        """Ids and mask of a text, or of several, under transformers' names and with its meanings.

        Args:
            text: one or several.
            add_special_tokens: whether the markers stand around it.
            padding: "max_length" fills up to ``max_length``, True to the longest.
            truncation: whether a text is cut to ``max_length`` tokens, the markers among them.
            max_length: the tokenizer's own by default.
            return_tensors: "pt" for tensors.

        Returns:
            A ``BatchEncoding`` with ``input_ids`` and ``attention_mask``.
        """
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        length = max_length or self.rules.positions
        rows = [
            self._marked(self.content(one), add_special_tokens, length if truncation else 0) for one in texts
        ]
        fill = (length if padding == "max_length" else max(map(len, rows), default=0)) if padding else 0
        masks = [[1] * len(row) + [0] * (fill - len(row)) for row in rows]
        rows = [row + [self.pad_token_id] * (fill - len(row)) for row in rows]
        alone = isinstance(text, str) and return_tensors is None
        said = {"input_ids": rows, "attention_mask": masks}
        chosen = {name: value[0] for name, value in said.items()} if alone else said
        return BatchEncoding(chosen, tensor_type=return_tensors)

    def _marked(self, ids: list[int], marked: bool, room: int) -> list[int]:
        front = [_FAIRSEQ["<s>"]] if marked and self.rules.fairseq else []
        end = [self.eos_token_id] if marked else []
        kept = ids[: max(0, room - len(front) - len(end))] if room else ids
        return [*front, *kept, *end]


def _read(model: bytes, source: object) -> Any:
    """The package's reader of a vocabulary."""
    package = import_extra("a SentencePiece vocabulary")
    try:
        pieces = package.SentencePieceProcessor(model_proto=model) if model else None
        usable = pieces is not None and pieces.get_piece_size() > 0
    except (RuntimeError, ValueError, TypeError):
        usable, pieces = False, None
    if not usable:
        raise UserError(f"{source} is no SentencePiece vocabulary ({len(model)} bytes); get it again")
    return pieces
