"""Names of SD1.5's weights in the original (CompVis), diffusers and kohya layouts, as tables that read both
ways.

A table pairs module names. It is worked out from how many levels and layers a network has, which its keys
tell, so that small networks of the same build are covered as well as SD1.5 itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .remains import without_text_remains

if TYPE_CHECKING:
    from torch import Tensor

#: (original, diffusers) names inside one residual block of the UNet and of the VAE.
_UNET_RESNET = (
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
#: Names that diffusers gave the VAE's attention before 0.18.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Pairs = list[tuple[str, str]]
#: No network of this build has a block of a higher number; a file that says so is damaged.
MOST_BLOCKS = 64


@dataclass(frozen=True)
class UNetBuild:
    """What decides the module names of a UNet: levels, layers a level, and the levels with attention."""

    levels: int
    layers: int
    attention: frozenset[int]

    @staticmethod
    def of(keys: Collection[str]) -> UNetBuild:
        """Read the build off parameter names in either layout.

        Raises:
            UserError: the keys are not a UNet's.
        """
        if any(key.startswith("down_blocks.") for key in keys):
            levels = 1 + largest_block(r"down_blocks\.(\d+)\.", keys)
            layers = 1 + largest_block(r"down_blocks\.0\.resnets\.(\d+)\.", keys)
            first = (f"down_blocks.{level}.attentions.0." for level in range(levels))
        elif any(key.startswith("input_blocks.") for key in keys):
            levels = 1 + sum(key.endswith(".0.op.weight") and key.startswith("input_blocks.") for key in keys)
            layers = (1 + largest_block(r"input_blocks\.(\d+)\.", keys)) // levels - 1
            first = (f"input_blocks.{1 + level * (layers + 1)}.1." for level in range(levels))
        else:
            raise UserError(
                f"no UNet: keys such as {shown_names(keys)} are neither of the original nor diffusers' layout"
            )
        return UNetBuild(
            levels,
            layers,
            frozenset(i for i, name in enumerate(first) if any(k.startswith(name) for k in keys)),
        )

    def encoder(self) -> Pairs:
        """Pairs of the part that ControlNets and branches copy: input, encoder and middle block."""
        pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")]
        pairs.append(("input_blocks.0.0", "conv_in"))
        for level in range(self.levels):
            for layer in range(self.layers):
                block = f"input_blocks.{1 + level * (self.layers + 1) + layer}"
                pairs += _inside(f"{block}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
                if level in self.attention:
                    pairs.append((f"{block}.1", f"down_blocks.{level}.attentions.{layer}"))
            if level < self.levels - 1:
                block = f"input_blocks.{(level + 1) * (self.layers + 1)}"
                pairs.append((f"{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        pairs += _inside("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
        pairs.append(("middle_block.1", "mid_block.attentions.0"))
        return pairs + _inside("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)

    def unet(self) -> Pairs:
        """Pairs of the whole UNet."""
        pairs = self.encoder()
        for level in range(self.levels):
            attention = self.levels - 1 - level in self.attention
            for layer in range(self.layers + 1):
                block = f"output_blocks.{level * (self.layers + 1) + layer}"
                pairs += _inside(f"{block}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET)
                if attention:
                    pairs.append((f"{block}.1", f"up_blocks.{level}.attentions.{layer}"))
            if level < self.levels - 1:
                block = f"output_blocks.{level * (self.layers + 1) + self.layers}"
                pairs.append((f"{block}.{1 + attention}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
        return [*pairs, ("out.0", "conv_norm_out"), ("out.2", "conv_out")]

    def controlnet(self, condition_blocks: int = 6) -> Pairs:
        """Pairs of a ControlNet.

        Encoder, zero convolutions and the condition-image path (``input_hint_block``).
        """
        pairs = self.encoder()
        pairs += [
            (f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}")
            for i in range(self.levels * (self.layers + 1))
        ]
        pairs.append(("middle_block_out.0", "controlnet_mid_block"))
        hint, path = "input_hint_block", "controlnet_cond_embedding"
        pairs.append((f"{hint}.0", f"{path}.conv_in"))
        pairs += [(f"{hint}.{2 * (i + 1)}", f"{path}.blocks.{i}") for i in range(condition_blocks)]
        return [*pairs, (f"{hint}.{2 * (condition_blocks + 1)}", f"{path}.conv_out")]


def vae_pairs(keys: Collection[str]) -> Pairs:
    """Pairs of an ``AutoencoderKL``, for parameter names in either layout.

    Raises:
        UserError: the keys are not a VAE's.
    """
    if any(key.startswith("encoder.down.") for key in keys):
        levels = 1 + largest_block(r"encoder\.down\.(\d+)\.", keys)
        layers = 1 + largest_block(r"encoder\.down\.0\.block\.(\d+)\.", keys)
    elif any(key.startswith("encoder.down_blocks.") for key in keys):
        levels = 1 + largest_block(r"encoder\.down_blocks\.(\d+)\.", keys)
        layers = 1 + largest_block(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", keys)
    else:
        raise UserError(
            f"no VAE: keys such as {shown_names(keys)} are neither of the original nor diffusers' layout"
        )
    pairs: Pairs = []
    for level in range(levels):
        # The original counts the decoder's levels from the finest, diffusers from the coarsest.
        up = levels - 1 - level
        for layer in range(layers):
            pairs += _inside(
                f"encoder.down.{level}.block.{layer}",
                f"encoder.down_blocks.{level}.resnets.{layer}",
                _VAE_RESNET,
            )
        for layer in range(layers + 1):
            pairs += _inside(
                f"decoder.up.{up}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}", _VAE_RESNET
            )
        pairs.append(
            (f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
        )
        pairs.append((f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"))
    for half in ("encoder", "decoder"):
        pairs += _inside(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET)
        pairs += _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        pairs += _inside(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET)
        pairs.append((f"{half}.norm_out", f"{half}.conv_norm_out"))
    same = (
        "encoder.conv_in",
        "encoder.conv_out",
        "decoder.conv_in",
        "decoder.conv_out",
        "quant_conv",
        "post_quant_conv",
    )
    return pairs + [(name, name) for name in same]


def rename(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename parameters by the module they belong to; the longest module name in ``table`` counts.

    Raises:
        UserError: parameters that belong to no module of the table.
    """
    renamed, unknown = {}, []
    for key, tensor in tensors.items():
        module = key
        while module and module not in table:
            module = module.rpartition(".")[0]
        if module:
            renamed[table[module] + key[len(module) :]] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"{len(unknown)} weights have unknown names, such as {shown_names(unknown)}; this is no SD1.5"
            " network"
        )
    return renamed


def to_diffusers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A table for ``rename``: original -> diffusers."""
    return dict(pairs)


def to_original(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A table for ``rename``: diffusers -> original."""
    return {theirs: ours for ours, theirs in pairs}


def unet_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet of either layout, in diffusers' layout."""
    if "conv_in.weight" in tensors:
        return dict(tensors)
    return rename(tensors, to_diffusers(UNetBuild.of(tensors).unet()))


def unet_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers UNet in the original layout."""
    return rename(tensors, to_original(UNetBuild.of(tensors).unet()))


def controlnet_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet of either layout, in diffusers' layout."""
    if "conv_in.weight" in tensors:
        return dict(tensors)
    hints = [key for key in tensors if re.fullmatch(r"input_hint_block\.\d+\.weight", key)]
    return rename(tensors, to_diffusers(UNetBuild.of(tensors).controlnet(len(hints) - 2)))


def controlnet_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers ControlNet in the original layout."""
    blocks = 1 + largest_block(r"controlnet_cond_embedding\.blocks\.(\d+)\.", tensors)
    return rename(tensors, to_original(UNetBuild.of(tensors).controlnet(blocks)))


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE of either layout in diffusers' layout.

    Its attention is a 1x1 convolution in one and linear in the other.
    """
    # What was trained beside the VAE (its loss's networks, the average's counters) is no part of it.
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(("loss.", "model_ema."))}
    if any(key.startswith("encoder.down.") for key in tensors):
        tensors = rename(tensors, to_diffusers(vae_pairs(tensors)))
    renamed = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.rpartition(".")
        head, _, leaf = module.rpartition(".")
        if head.endswith(".attentions.0") and leaf in _OLD_VAE_ATTENTION:
            key = f"{head}.{_OLD_VAE_ATTENTION[leaf]}.{parameter}"
        attention = ".attentions.0.to_" in key
        renamed[key] = tensor.flatten(1) if attention and tensor.ndim == 4 else tensor
    return renamed


def vae_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers VAE in the original layout."""
    renamed = rename(tensors, to_original(vae_pairs(tensors)))
    return {
        key: tensor[..., None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in renamed.items()
    }


def text_to_plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's text encoder without ``text_model.`` before each name and without what is no weight of it.

    Files differ in the prefix, transformers changed it with version 5.6, and some files hold the position
    numbers, in half precision even.

    Raises:
        UserError: something that CLIP's text encoder has not.
    """
    plain = {
        key.removeprefix("transformer.").removeprefix("text_model."): tensor
        for key, tensor in tensors.items()
    }
    return without_text_remains(plain, _TEXT_PARTS)


_TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")


def text_to_prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's text encoder with ``text_model.`` before each name, as every published file has it."""
    return {f"text_model.{key}": tensor for key, tensor in text_to_plain(tensors).items()}


def flat(name: str) -> str:
    """A module name as kohya's files write it: dots become underscores."""
    return name.replace(".", "_")


def _inside(ours: str, theirs: str, pairs: Iterable[tuple[str, str]]) -> Pairs:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in pairs]


def shown_names(keys: Iterable[str]) -> str:
    """Some names of weights, for messages; what is in a file may be of any length."""
    return ", ".join(printable(key, 120) for key in sorted(keys)[:3])


def largest_block(pattern: str, keys: Iterable[str]) -> int:
    r"""The largest number that stands for ``\d+`` in names that begin as ``pattern``.

    Raises:
        UserError: there is none, or one beyond ``MOST_BLOCKS``.
    """
    numbers = [int(found[1]) for key in keys if (found := re.match(pattern.replace(r"\d+", r"\d{1,6}"), key))]
    if not numbers or max(numbers) > MOST_BLOCKS:
        what = f"has block {max(numbers)}, more than any network has" if numbers else "is incomplete"
        raise UserError(f"the network {what} (keys of the form {pattern}); get the file again")
    return max(numbers)
