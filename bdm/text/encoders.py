"""Text encoders and tokenizers of transformers' folders and cn_clip's files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..extras import require_packages
from ..formats.choice import FileChoice
from ..formats.weights import read_tensors, read_weights_folder
from .vocabulary import chinese_clip_tokenizer


def load_encoder(folder: Path, files: FileChoice) -> nn.Module:
    """Build the text encoder of a folder and load its weights by hand.

    ``from_pretrained`` is not used: it zeroes the [PAD] row of Chinese CLIP, which is attended here, and
    gives a text model with random weights when asked to read one from a full CLIP checkpoint.
    """
    from transformers import AutoConfig

    model = build_text_model(AutoConfig.from_pretrained(folder))
    _load_by_suffix(model, read_weights_folder(folder, files), str(folder))
    return model


def build_text_model(config: Any) -> nn.Module:
    """The text encoder that a transformers configuration describes, with fresh weights."""
    from transformers import AutoModel, AutoModelForTextEncoding, ChineseCLIPTextModel

    if config.model_type in ("chinese_clip", "chinese_clip_text_model"):
        text: Any = getattr(config, "text_config", config)
        return ChineseCLIPTextModel(text, add_pooling_layer=False)
    # T5's and its like's encoder alone; AutoModel would add the decoder.
    alone = type(config) in AutoModelForTextEncoding._model_mapping
    return (AutoModelForTextEncoding if alone else AutoModel).from_config(config)


def _load_by_suffix(model: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load a state dict whose keys may carry a prefix (``text_model.``, ``bert.``).

    Every weight must be found.
    """
    # Tied weights appear once in a file and several times in the model (or the other way round): one name is
    # enough.
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    first = next(iter(names.values()))[0]
    prefixes = {
        key.removesuffix(n) for group in names.values() for n in group for key in tensors if key.endswith(n)
    } | {""}

    def found(prefix: str) -> int:
        return sum(any(prefix + n in tensors for n in group) for group in names.values())

    prefix = max(sorted(prefixes), key=found) if len(prefixes) > 1 else ""
    state = {}
    for group in names.values():
        source = next((tensors[prefix + n] for n in group if prefix + n in tensors), None)
        # A pooler reads the hidden states and is not part of them; files may lack it.
        if source is None and not group[0].startswith("pooler."):
            raise UserError(
                f"{origin}: no weight for {group[0]!r} ({found(prefix)} of {len(names)} found); "
                f"give a text encoder's folder, such as Chinese CLIP's (first weight wanted: {first!r})"
            )
        if source is not None:
            state |= dict.fromkeys(group, source)
    wrong = [n for n, t in model.state_dict().items() if n in state and state[n].shape != t.shape]
    if wrong:
        raise UserError(
            f"{origin}: {wrong[0]!r} has shape {tuple(state[wrong[0]].shape)}, its config.json says "
            f"{tuple(model.state_dict()[wrong[0]].shape)}; weights and configuration do not belong together"
        )
    # The configuration may name another dtype than the file's, and copying would round to it.
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    model.to(reduce(torch.promote_types, dtypes)).load_state_dict(state, strict=False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a text encoder's folder; Chinese CLIP's where the folder has none of its own."""
    from transformers import AutoConfig, AutoTokenizer

    if any(
        (folder / name).exists()
        for name in ("tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    ):
        if not (folder / "tokenizer.json").exists() and not (folder / "vocab.txt").exists():
            require_packages("a SentencePiece vocabulary")
        return AutoTokenizer.from_pretrained(folder)
    if AutoConfig.from_pretrained(folder).model_type.startswith("chinese_clip"):
        return chinese_clip_tokenizer()
    raise UserError(
        f"{folder} holds no tokenizer (tokenizer.json, vocab.txt or spiece.model); save one beside the"
        " weights"
    )


def load_cn_clip(path: Path) -> nn.Module:
    """The text tower of an original cn_clip checkpoint (``{"state_dict": {"module.bert.": ...}}``)."""
    tensors = {key.removeprefix("module."): value for key, value in read_tensors(path).items()}
    bert = {key.removeprefix("bert."): value for key, value in tensors.items() if key.startswith("bert.")}
    model = build_text_model(cn_clip_config(bert, path))
    _load_by_suffix(model, bert, str(path))
    return model


def cn_clip_config(bert: Mapping[str, Tensor], path: Path) -> Any:
    """The configuration of cn_clip's text tower, read off the shapes of its weights."""
    from transformers import ChineseCLIPTextConfig

    words = bert.get("embeddings.word_embeddings.weight")
    if words is None:
        raise UserError(f"{path}: no 'bert.' weights; a Chinese CLIP checkpoint of cn_clip is wanted")
    layers = 1 + max(int(key.split(".")[2]) for key in bert if key.startswith("encoder.layer."))
    return ChineseCLIPTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=layers,
        # All RoBERTa-wwm models of cn_clip (RBT3, base, large) have heads of width 64.
        num_attention_heads=max(1, words.shape[1] // 64),
        intermediate_size=bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=bert["embeddings.position_embeddings.weight"].shape[0],
    )
