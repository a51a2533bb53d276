"""Settings of a network that no weight tells, and that change what its weights compute.

Only names that are known to change nothing are left out of a comparison; whatever else a configuration says
counts, and what its class does not know is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..errors import UserError, printable

#: Where a network comes from, and which programs wrote it.
_ORIGIN = (
    "_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values",
    "_attn_implementation_autoset", "architectures", "model_type", "transformers_version", "torch_dtype",
    "dtype", "finetuning_task", "tokenizer_class", "name_or_path",
)  # fmt: skip
#: By which code attention is computed, which no file chooses.
_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
#: The picture size it was trained at, and precisions that drawing chooses for itself.
_NO_ARITHMETIC = ("sample_size", "image_size", "upcast_attention", "force_upcast")
#: What only training heeds, among it what diffusers' moving average notes.
_TRAINING = (
    "dropout", "attention_dropout", "initializer_factor", "initializer_range", "gradient_checkpointing",
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
)  # fmt: skip
#: Of a text encoder, what only its pooled output heeds, which SD1.5 does not read; its vocabulary grows with
#: embeddings, and the weights tell it.
_POOLED = ("projection_dim", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
#: What transformers wrote into every configuration until its version 5, for models that write texts.
_OF_ALL_TRANSFORMERS = (
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "id2label", "label2id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "top_k", "top_p", "torchscript", "typical_p",
    "use_bfloat16", "use_cache", "use_return_dict",
)  # fmt: skip
#: Settings that change nothing of what is drawn from given weights.
HARMLESS = frozenset(_ORIGIN + _KERNELS + _NO_ARITHMETIC + _TRAINING + _POOLED + _OF_ALL_TRANSFORMERS)
#: Settings that may be said once for all blocks, or for each.
_OF_BLOCKS = (
    "attention_head_dim", "num_attention_heads", "cross_attention_dim", "layers_per_block",
    "only_cross_attention", "transformer_layers_per_block",
)  # fmt: skip
#: One function by two names.
_ACTIVATIONS = {"swish": "silu"}


@cache
def class_defaults(name: str) -> dict[str, Any]:
    """What a network's class takes where nothing is said.

    Args:
        name: "unet", "vae", "controlnet" or "text_encoder"; the branch's are those of a ControlNet.
    """
    if name == "text_encoder":
        from transformers import CLIPTextConfig

        return CLIPTextConfig().to_dict()
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.get(name, ControlNetModel)
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def refuse_unknown_settings(name: str, noted: Mapping[str, Any]) -> None:
    """Refuse a configuration that says what the network's class does not know.

    Empty settings (None, False, no entries) say nothing.

    Args:
        name: see ``class_defaults``.
        noted: the configuration.

    Raises:
        UserError: names the first one.
    """
    known = HARMLESS | class_defaults(name).keys()
    for key, value in noted.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise UserError(
                f"the configuration says {printable(key, 60)} {printable(value, 60)}, and what that means is"
                " not known here; reading the weights without it might draw something else"
            )


def different_settings(
    name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings in which two networks of one class differ, though their weights may have the same shapes.

    Args:
        name: see ``class_defaults``.
        theirs: a configuration; what it leaves out is the class's default.
        ours: another.

    Returns:
        By setting, both values.
    """
    defaults = class_defaults(name)
    pairs = {
        key: (theirs.get(key, default), ours.get(key, default))
        for key, default in defaults.items()
        if key not in HARMLESS
    }
    return {
        key: pair
        for key, pair in pairs.items()
        if _meaning(key, pair[0], defaults[key]) != _meaning(key, pair[1], defaults[key])
    }


def _meaning(key: str, value: Any, default: Any) -> Any:
    """A setting in one of the forms that mean the same."""
    if isinstance(value, tuple):  # JSON knows none
        value = list(value)
    if key in _OF_BLOCKS and isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    if value is None and (default is False or key == "shift_factor"):
        return 0  # which False is too
    return _ACTIVATIONS.get(value, value) if isinstance(value, str) else value


def refuse_other_settings(
    name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], source: object
) -> None:
    """Refuse a network whose noted settings are not those of the one that is to compute with its weights.

    Args:
        name: see ``class_defaults``.
        theirs: the settings that are noted beside the weights.
        ours: the live network's.
        source: for messages.

    Raises:
        UserError: names the settings and both values of each.
    """
    different = different_settings(name, theirs, ours)
    if not different:
        return
    shown = [
        f"{key} {printable(value, 60)}, not {printable(own, 60)}" for key, (value, own) in different.items()
    ]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    part = name.replace("_", " ")
    raise UserError(
        f"{source}: its {part} is made for {'; '.join(shown[:3])}{more}, with which this pipeline's {part}"
        " computes; attach one made for the same settings, or load the whole model as the backbone"
        " (backbone=)"
    )
