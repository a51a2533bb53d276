"""The branch: a trainable copy of the UNet's encoder that reads the native-language prompt (arXiv 2309.00952,
section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn, get_down_block
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import UserError, printable
from ..formats.load_options import LoadKeywords, read_options
from ..formats.settings import different_settings, refuse_unknown_settings
from ..formats.weights import cast, read_json, read_weights_folder, resolve_folder
from ..models.backbone import check_backbone
from .residuals import scaled


@dataclass
class BranchOutput(BaseOutput):
    """What the branch adds to the backbone, under ControlNet's field names.

    Attributes:
        down_block_res_samples: one (B, C_i, h_i, w_i) tensor per skip connection of the UNet (12 for SD1.5).
        mid_block_res_sample: (B, C, h, w), added to the middle block's output.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


def zero_convolution(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as zero, so that a fresh branch changes nothing (ControlNet, arXiv
    2302.05543).
    """
    convolution = nn.Conv2d(channels, channels, kernel_size=1)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
    return convolution


class BranchModel(ModelMixin, ConfigMixin):
    """Encoder and middle block of an SD1.5 UNet plus zero convolutions; no condition-image path.

    Parameter names are those of the released BDM weights: ``conv_in``, ``time_embedding``, ``down_blocks``,
    ``mid_block``, ``controlnet_down_blocks``, ``controlnet_mid_block``. Arguments are those of
    ``UNet2DConditionModel``; ``cross_attention_dim`` is the width of the native text features (1024 for
    Chinese CLIP huge).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        attention_head_dim: int = 8,
    ) -> None:
        super().__init__()
        channels = block_out_channels[0]
        time_dim = channels * 4
        self.conv_in = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
        self.time_proj = Timesteps(channels, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(channels, time_dim, act_fn=act_fn)
        self.down_blocks = nn.ModuleList()
        skips = [channels]
        for i, (kind, out_channels) in enumerate(zip(down_block_types, block_out_channels, strict=True)):
            last = i == len(block_out_channels) - 1
            self.down_blocks.append(
                get_down_block(
                    kind,
                    num_layers=layers_per_block,
                    in_channels=channels,
                    out_channels=out_channels,
                    temb_channels=time_dim,
                    add_downsample=not last,
                    resnet_eps=norm_eps,
                    resnet_act_fn=act_fn,
                    resnet_groups=norm_num_groups,
                    cross_attention_dim=cross_attention_dim,
                    # diffusers' name is historical: for SD1.5 it is the number of heads.
                    num_attention_heads=attention_head_dim,
                    attention_head_dim=attention_head_dim,
                    downsample_padding=downsample_padding,
                )
            )
            channels = out_channels
            skips += [channels] * (layers_per_block + (not last))
        self.mid_block = UNetMidBlock2DCrossAttn(
            in_channels=channels,
            temb_channels=time_dim,
            resnet_eps=norm_eps,
            resnet_act_fn=act_fn,
            output_scale_factor=mid_block_scale_factor,
            cross_attention_dim=cross_attention_dim,
            num_attention_heads=attention_head_dim,
            resnet_groups=norm_num_groups,
        )
        self.controlnet_down_blocks = nn.ModuleList(map(zero_convolution, skips))
        self.controlnet_mid_block = zero_convolution(channels)

    @classmethod
    def from_backbone(cls, unet: UNet2DConditionModel, text_dim: int | None = None) -> BranchModel:
        """A fresh branch for a backbone: every weight that fits is copied.

        Args:
            unet: the SD1.5 UNet.
            text_dim: width of the native text features; the backbone's own if None. Where it differs, the key
                and value projections of the cross-attentions (``attn2.to_k``, ``attn2.to_v``) cannot be
                copied; they start as fresh linear layers (PyTorch's default, uniform in +-1/sqrt(text_dim)),
                the rest of each cross-attention is kept.

        Returns:
            A branch whose residuals are exactly zero. Weights that are not copied are drawn from torch's
            global generator.

        Raises:
            UserError: the backbone is not an SD1.5 UNet.
        """
        check_backbone(unet)
        config: dict[str, Any] = {key: unet.config[key] for key in cls._own_arguments() if key in unet.config}
        config["cross_attention_dim"] = text_dim or unet.config["cross_attention_dim"]
        with unet.device:
            branch = cls(**config)
        copied, own = unet.state_dict(), branch.state_dict()
        fitting = {
            key: copied[key]
            for key, value in own.items()
            if key in copied and copied[key].shape == value.shape
        }
        branch.load_state_dict(own | fitting)
        # nn.Module's own: ModelMixin's warns about float32 modules even where there are none.
        nn.Module.to(branch, unet.device, unet.dtype)
        return branch

    def with_fresh_text(self, text_dim: int) -> BranchModel:
        """This branch for features of another native text encoder.

        Args:
            text_dim: width of those features.

        Returns:
            A branch of its own weights, float32: the key and value projections of the cross-attentions
            (``attn2.to_k``, ``attn2.to_v``) are fresh linear layers, drawn from torch's global generator, as
            in ``from_backbone``; everything else is this one's.
        """
        config: dict[str, Any] = {name: self.config[name] for name in self._own_arguments()}
        config["cross_attention_dim"] = text_dim
        fresh = type(self)(**config)
        kept = {
            name: weight
            for name, weight in self.state_dict().items()
            if not name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
        }
        fresh.load_state_dict(fresh.state_dict() | kept)
        return fresh

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        return_dict: bool = True,
    ) -> BranchOutput | tuple[tuple[Tensor, ...], Tensor]:
        """Residuals for the backbone's skips and middle block.

        Args:
            sample: (B, 4, h, w) noisy scaled latents, the backbone's own input.
            timestep: a number or (B,) in [0, 1000).
            encoder_hidden_states: (B, L, cross_attention_dim) native text features; all positions are
                attended.
            conditioning_scale: factor of all residuals, or a (B,) tensor of one for each sample.
            return_dict: return a tuple if False.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        emb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        sample = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            text = (
                {"encoder_hidden_states": encoder_hidden_states}
                if getattr(block, "has_cross_attention", False)
                else {}
            )
            sample, outputs = block(hidden_states=sample, temb=emb, **text)
            skips += outputs
        sample = self.mid_block(sample, emb, encoder_hidden_states=encoder_hidden_states)
        down = tuple(
            scaled(convolution(skip), conditioning_scale)
            for convolution, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        )
        middle = scaled(self.controlnet_mid_block(sample), conditioning_scale)
        return BranchOutput(down, middle) if return_dict else (down, middle)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        subfolder: str | None = None,
        **options: Unpack[LoadKeywords],
    ) -> BranchModel:
        """Load a branch: a folder written by ``save_pretrained``, or the released one as it is.

        Args:
            source: folder or hub name; ``config.json`` beside safetensors or a ``.bin`` pickle of tensors.
            subfolder: folder inside ``source``.
            options: ``dtype`` (as stored by default), ``variant``, ``use_safetensors``, ``device_map`` ... as
                in diffusers; see ``LoadKeywords``.

        Returns:
            The branch, in evaluation mode.

        Raises:
            UserError: missing or damaged files, weights that do not fit the configuration, another kind of
                model, or an option that is not known or not done here.
        """
        loading = read_options(options, "BranchModel.from_pretrained", default=None)
        folder = resolve_folder(source, subfolder, hub=loading.hub)
        config = read_json(folder / "config.json")
        if config.get("_class_name") not in ("BranchModel", "ControlNetModelBDM"):
            raise UserError(
                f"{folder} holds a {config.get('_class_name')}; allowed are BranchModel and"
                " ControlNetModelBDM (the released one)"
            )
        if config.get("addition_embed_type"):
            raise UserError(
                f"{folder} is a branch for SDXL (addition_embed_type); only SD1.5 branches can be loaded"
            )
        _refuse_other_arithmetic(cls._own_arguments(), config, folder)
        with torch.device("meta"):
            branch = cls(**{key: value for key, value in config.items() if key in cls._own_arguments()})
        tensors = read_weights_folder(folder, loading.files)
        _check_weights(branch, tensors, folder)
        branch.load_state_dict(
            {key: cast(t, loading.dtype, key, folder).to(loading.device) for key, t in tensors.items()},
            assign=True,
        )
        return branch.eval()

    @classmethod
    def _own_arguments(cls) -> tuple[str, ...]:
        return tuple(cls._get_init_keys(cls) - {"self"})


#: ControlNet's arguments of the condition image, which the released configuration carries and the branch does
#: not have.
_OF_IMAGES = (
    "conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order",
)  # fmt: skip


def _refuse_other_arithmetic(own: tuple[str, ...], config: dict[str, Any], folder: Path) -> None:
    """Refuse a configuration with settings of a ControlNet that the branch lacks, unless they are the usual
    ones.
    """
    told = {key: value for key, value in config.items() if key not in (*own, *_OF_IMAGES)}
    try:
        refuse_unknown_settings("branch", told)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    for key, (value, usual) in different_settings("branch", told, {}).items():
        raise UserError(
            f"{folder}: the configuration says {key} {printable(value, 60)}, and a branch computes with"
            f" {usual} alone; give a branch made for SD1.5"
        )


def _check_weights(branch: BranchModel, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = branch.state_dict()
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise UserError(
            f"{folder} lacks {len(missing)} of the branch's {len(wanted)} weights, such as {missing[0]!r}"
        )
    if extra := sorted(tensors.keys() - wanted.keys()):
        raise UserError(
            f"{folder} holds {len(extra)} weights that a branch does not have, such as {extra[0]!r}; is it a"
            " ControlNet?"
        )
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            raise UserError(
                f"{folder}: {key!r} has shape {tuple(tensors[key].shape)} and its config.json says"
                f" {tuple(value.shape)}"
            )
