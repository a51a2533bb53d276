"""Trained parts -> one pipeline folder that can be shared."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from .files import atomic_write, refuse_occupied
from .method.branch import BranchModel
from .models.backbone import load_backbone
from .models.fingerprint import refuse_other_vae
from .models.samplers import other_sampler
from .pipeline import BridgePipeline
from .text.native import NativeTextEncoder

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json")


def card_of(folder: str | Path) -> Path:
    """Where a part's card lies: beside it, or, where a run trained it within a pipeline, beside that."""
    own, whole = Path(folder, "card.json"), Path(folder).parent
    within = not own.is_file() and (whole / "model_index.json").is_file()
    return whole / "card.json" if within else own


def assemble(
    backbone: str,
    branch: str,
    native_text_encoder: str,
    out: Path,
    dtype: torch.dtype = torch.float32,
    vocabularies: bool = True,
) -> None:
    """Write a ``BridgePipeline`` folder, with the cards of the parts that have one.

    Args:
        backbone: folder or hub name of the SD1.5 model.
        branch: folder of the branch.
        native_text_encoder: folder, hub name or cn_clip file of the native text encoder, or the name of one
            that a pip package carries.
        out: the new folder; a ``BridgePipeline``'s that is there is replaced once the new one is whole.
        dtype: dtype of the stored weights.
        vocabularies: store what pip packages carry: the tokenizers' vocabularies (CLIP's and Chinese CLIP's
            are found without) and the native text encoder where it is a package's, which is named otherwise.

    Raises:
        UserError: a part cannot be read, or ``out`` holds something else; nothing is written then.
    """
    out = out.resolve()
    refuse_occupied(out, replaces="BridgePipeline")
    stock = load_backbone(backbone, dtype)
    refuse_other_vae(branch, stock.vae, backbone)
    native = NativeTextEncoder.from_pretrained(native_text_encoder, torch_dtype=dtype)
    native.save_by_name = not vocabularies and native.package is not None
    pipe = BridgePipeline(
        stock.vae, stock.text_encoder, stock.tokenizer, stock.unet,
        other_sampler("DPM++ 2M", stock.scheduler),
        BranchModel.from_pretrained(branch, torch_dtype=dtype),
        native,
    )  # fmt: skip
    cards = {
        Path(backbone, "card.json"): "unet",
        Path(backbone, "vae", "card.json"): "vae",
        Path(backbone, "text_encoder", "card.json"): "text_encoder",
        Path(branch, "card.json"): "branch",
        card_of(native_text_encoder): "native_text_encoder",
    }
    with atomic_write(out) as folder:
        pipe.save_pretrained(folder)
        for card, part in cards.items():
            if card.is_file():
                shutil.copy(card, folder / part / "card.json")
        if not vocabularies:
            for part in ("tokenizer", "native_text_encoder"):
                for name in _VOCABULARIES:
                    (folder / part / name).unlink(missing_ok=True)
