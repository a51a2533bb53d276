"""Which released native-language system a folder holds, by what its JSON and its files are called.

Class and library names in ``model_index.json`` are data here: nothing that they name is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, printable
from .folders import read_json

#: How a system's text encoder is built, and how its texts are cut.
Cutter = Literal["pieces", "word pieces"]


@dataclass(frozen=True)
class ReleasedSystem:
    """A latent diffusion model of SD1.5's shape with a native text encoder in the place of CLIP's.

    Attributes:
        name: what it is called.
        cutter: kind of its tokenizer.
        mask: whether padding is hidden from the text encoder.
        lower_case: whether texts are lower-cased before its own tokenizer sees them.
        positions: tokens of a text, markers counted, where its files do not say; as its pipeline sets them.
        fixed: whether that number holds whatever the files say.
        trained: what of it is known to be no longer SD's, for messages.
    """

    name: str
    cutter: Cutter
    mask: bool = False
    lower_case: bool = False
    positions: int = 77
    fixed: bool = False
    trained: str = "its UNet was trained with its text encoder"


_JAPANESE = ReleasedSystem("Japanese Stable Diffusion", "pieces", lower_case=True, fixed=True)
_TAIYI = ReleasedSystem(
    "Taiyi Stable Diffusion", "word pieces",
    trained="nothing in its folder tells whether its UNet was trained too (Chinese: no, Chinese-EN: yes)",
)  # fmt: skip
_ALT = "its UNet's cross-attention was trained for its text encoder"
_ALT_M2 = ReleasedSystem("AltDiffusion m2", "pieces", mask=True, trained=_ALT)
_ALT_M9 = ReleasedSystem("AltDiffusion m9", "pieces", mask=True, trained=_ALT)
_SKYPAINT = ReleasedSystem("SkyPaint", "word pieces")
_PAI = ReleasedSystem("PAI-Diffusion", "word pieces")
_EITHER = ReleasedSystem("SkyPaint or PAI-Diffusion", "word pieces")

#: Rows of the vocabularies that tell two systems of one build apart: multilingual BERT's, Chinese BERT's.
_VOCABULARIES = {105_879: _SKYPAINT, 119_547: _SKYPAINT, 21_128: _PAI}

#: By a part of the pipeline class's name: systems that are not of SD1.5's shape, and what they are.
_OTHER_CLASSES = {
    "Kolors": "Kolors, which is SDXL-shaped",
    "HunyuanDiT": "HunyuanDiT, a diffusion transformer",
    "JapaneseStableDiffusionXL": "Japanese SDXL, which is SDXL-shaped",
}
#: By a part of a folder's name, in lower case, where the class says SDXL alone.
_OTHER_NAMES = {
    "taiyi": "Taiyi-XL", "japanese": "Japanese SDXL", "kolors": "Kolors", "hunyuan": "HunyuanDiT",
    "altdiffusion": "AltDiffusion m18", "pai-diffusion": "PAI-Diffusion xlarge",
}  # fmt: skip
_INSTEAD = (
    "this library draws with SD1.5: use Japanese Stable Diffusion, Taiyi-Stable-Diffusion-1B,"
    " AltDiffusion (m2, m9), SkyPaint or PAI-Diffusion large, or a bridge on SD1.5"
)


@dataclass(frozen=True)
class _Facts:
    """What a folder says of itself.

    Attributes:
        pipeline: name of the pipeline's class.
        encoder: configuration of the text encoder.
        tokenizer: class of the tokenizer, or what its files are those of; "" where nothing tells.
        unet: configuration of the UNet.
        called: names by which folder and text encoder go, in lower case.
    """

    pipeline: str
    encoder: Mapping[str, Any]
    tokenizer: str
    unet: Mapping[str, Any]
    called: str

    @staticmethod
    def of(folder: Path) -> _Facts | None:
        """The facts of a pipeline's folder with a text encoder; None for others."""
        index = folder / "model_index.json"
        if not index.is_file():
            return None
        said = read_json(index)
        encoder = _json(folder / "text_encoder" / "config.json")
        called = (
            f"{folder.absolute().name} {encoder.get('_name_or_path', '')} {said.get('_name_or_path', '')}"
        )
        return _Facts(
            # Pipelines with code of their own name its file beside the class.
            str(said.get("_class_name", "")),
            encoder,
            _tokenizer_class(folder / "tokenizer", said.get("tokenizer")),
            _json(folder / "unet" / "config.json"),
            called.lower(),
        )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _tokenizer_class(folder: Path, named: Any) -> str:
    """The class of a folder's tokenizer: by the pipeline, by itself, or by its files."""
    listed = named[-1] if isinstance(named, list) and named else ""
    said = listed or _json(folder / "tokenizer_config.json").get("tokenizer_class")
    if isinstance(said, str) and said not in ("", "PreTrainedTokenizerFast", "TokenizersBackend"):
        return said.removesuffix("Fast")
    by_file = {
        "spiece.model": "T5Tokenizer", "sentencepiece.bpe.model": "XLMRobertaTokenizer",
        "vocab.txt": "BertTokenizer", "vocab.json": "CLIPTokenizer",
    }  # fmt: skip
    return next((kind for name, kind in by_file.items() if (folder / name).is_file()), "")


def released_system(folder: Path) -> ReleasedSystem | None:
    """The released system that a folder holds; None for every other folder or file.

    Raises:
        UserError: its JSON cannot be read.
    """
    facts = _Facts.of(folder) if folder.is_dir() else None
    if facts is None or not facts.encoder or _other_shape(facts):
        return None
    kind = facts.encoder.get("model_type")
    if kind == "xlm-roberta" and "project_dim" in facts.encoder:
        return _ALT_M9 if facts.encoder.get("has_pre_transformation") or "m9" in facts.called else _ALT_M2
    if kind == "bert":
        return _taiyi(facts.called)
    if kind == "clip_text_model" and facts.tokenizer == "T5Tokenizer":
        return _JAPANESE
    if kind == "clip_text_model" and facts.tokenizer == "BertTokenizer":
        return _of_word_pieces(facts)
    return None


def _taiyi(called: str) -> ReleasedSystem:
    """Taiyi's systems are built alike, so that only names tell them apart."""
    for ending, name in (("chinese-en", "Chinese-EN"), ("chinese", "Chinese")):
        if ending in called:
            return ReleasedSystem(f"{_TAIYI.name} ({name})", "word pieces", trained=_TAIYI.trained)
    return ReleasedSystem(f"{_TAIYI.name} (Chinese or Chinese-EN)", "word pieces", trained=_TAIYI.trained)


def _of_word_pieces(facts: _Facts) -> ReleasedSystem:
    if "skypaint" in facts.called:
        return _SKYPAINT
    if "pai-diffusion" in facts.called:
        return _PAI
    return _VOCABULARIES.get(facts.encoder.get("vocab_size", 0), _EITHER)


def _other_shape(facts: _Facts) -> str:
    """What a native-language system of another shape than SD1.5's is; "" for everything else."""
    for part, what in _OTHER_CLASSES.items():
        if part in facts.pipeline:
            return what
    shape = _shape(facts)
    if not shape:
        return ""
    if facts.encoder.get("model_type") == "xlm-roberta" and "project_dim" in facts.encoder:
        return f"AltDiffusion m18, which is {shape}"
    name = next((name for part, name in _OTHER_NAMES.items() if part in facts.called), "")
    if not name and facts.tokenizer == "BertTokenizer":
        name = "Taiyi-XL" if shape == "SDXL-shaped" else "a system of Chinese word pieces"
    if not name and facts.tokenizer in ("T5Tokenizer", "XLMRobertaTokenizer"):
        name = "Japanese SDXL" if shape == "SDXL-shaped" else "a system of SentencePiece's pieces"
    return f"{name}, which is {shape}" if name else ""


def _shape(facts: _Facts) -> str:
    """The shape of a UNet that is not SD1.5's; "" for SD1.5's."""
    if facts.unet.get("addition_embed_type") == "text_time" or "StableDiffusionXL" in facts.pipeline:
        return "SDXL-shaped"
    wide = facts.unet.get("cross_attention_dim") == 1024 or facts.encoder.get("project_dim") == 1024
    return "SD2.1-shaped" if wide or facts.unet.get("use_linear_projection") else ""


def other_system(folder: Path) -> str:
    """What a folder's native-language system is that is not of SD1.5's shape; "" where it is none."""
    facts = _Facts.of(folder) if folder.is_dir() else None
    return "" if facts is None else _other_shape(facts)


def refuse_other_systems(folder: Path) -> None:
    """Refuse, by its name, a native-language system that is not of SD1.5's shape.

    Raises:
        UserError: says what to use instead.
    """
    if what := other_system(folder):
        raise UserError(f"{printable(folder, 300)} is {what}; {_INSTEAD}")


def refuse_as_english(folder: Path) -> None:
    """Refuse a system whose text encoder is not English CLIP where that is what is wanted.

    Raises:
        UserError: names the system, and says what to use instead.
    """
    refuse_other_systems(folder)
    if system := released_system(folder):
        raise UserError(
            f"{printable(folder, 300)} is {system.name}: its text encoder reads a vocabulary of its own, not"
            " CLIP's English; draw from it with bdm.BridgePipeline.from_pretrained, or give an SD1.5 model"
        )
