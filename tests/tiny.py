"""Tiny random models with SD1.5's structure and key names."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import ChineseCLIPTextConfig, ChineseCLIPTextModel, CLIPTextConfig, CLIPTextModel

from bdm.method.branch import BranchModel
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import chinese_clip_tokenizer

TEXT_DIM, NATIVE_DIM = 32, 48


def make_unet(**changes) -> UNet2DConditionModel:
    arguments = dict(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return UNet2DConditionModel(**arguments | changes).eval().requires_grad_(False)


def make_vae() -> AutoencoderKL:
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return (
        AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, **kinds)
        .eval()
        .requires_grad_(False)
    )


def make_branch(unet: UNet2DConditionModel, width: int = NATIVE_DIM) -> BranchModel:
    """A branch whose zero convolutions are not zero, so that it acts."""
    branch = BranchModel.from_backbone(unet, width).eval()
    for convolution in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.2)
        torch.nn.init.normal_(convolution.bias, std=0.2)
    return branch


def make_native_model(**changes) -> ChineseCLIPTextModel:
    arguments = dict(
        vocab_size=21128,
        hidden_size=NATIVE_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return ChineseCLIPTextModel(ChineseCLIPTextConfig(**arguments | changes), add_pooling_layer=False).eval()


def make_native() -> NativeTextEncoder:
    return NativeTextEncoder(make_native_model(), chinese_clip_tokenizer())


def make_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config).eval()
