"""Files as the community shares them, made for tiny models."""

import json

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bdm.formats import names
from bdm.formats.checkpoint import CONFIG_KEY, write_checkpoint


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def write_original(pipe, path, configs=True, dtype=torch.float32):
    """A pipeline's weights as an original-layout file."""
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}
    weights = {name: {k: v.to(dtype) for k, v in part.state_dict().items()} for name, part in parts.items()}
    weights["text_encoder"] = names.text_to_plain(weights["text_encoder"])
    settings = {
        name: json.loads(part.to_json_string() if name != "text_encoder" else part.config.to_json_string())
        for name, part in parts.items()
    }
    tensors = write_checkpoint(weights)
    metadata = {CONFIG_KEY: json.dumps(settings)} if configs else {}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return tensors, metadata


def make_controlnet(unet, blocks=(8, 16, 16, 32)):
    torch.manual_seed(5)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=blocks)
    for convolution in (
        *controlnet.controlnet_down_blocks,
        controlnet.controlnet_mid_block,
        controlnet.controlnet_cond_embedding.conv_out,
    ):
        torch.nn.init.normal_(convolution.weight, std=0.2)
    return controlnet.eval().requires_grad_(False)


def ip_adapter_tensors(unet):
    """An IP-Adapter's file for a tiny UNet, whose image encoder's features are 32 wide."""
    weights, key = {}, 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            wide = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            weights |= {f"ip_adapter.{key}.to_{kind}_ip.weight": torch.randn(wide, 32) for kind in "kv"}
            key += 2
    projection = {
        "proj.weight": torch.randn(128, 32),
        "proj.bias": torch.zeros(128),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    return weights | {f"image_proj.{name}": value for name, value in projection.items()}


def make_image_encoder():
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=16, projection_dim=32,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def mutate(content, dice):
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        kind, at = dice.randrange(5), dice.randrange(len(content))
        if kind == 0:
            content[at] = dice.randrange(256)
        elif kind == 1:
            del content[at : at + dice.choice((1, 8, 200))]
        elif kind == 2:
            content[at:at] = bytes(dice.randrange(256) for _ in range(dice.choice((1, 8))))
        elif kind == 3:
            content[at : at + 8] = dice.choice((2**63 - 1, 2**64 - 1, 0, 2**32)).to_bytes(8, "little")
        else:
            content[at : at + 1] = bytes([content[at] ^ (1 << dice.randrange(8))])
        if not content:
            return b""
    return bytes(content)
