"""Conversions are round trips, and what comes out loads elsewhere."""

import json

import pytest
import torch
from conftest import TEXT_DIM, make_unet
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from test_formats import make_controlnet, same, write_original

from bdm.branch import BranchModel
from bdm.convert import convert
from bdm.errors import UserError
from bdm.formats.adapter import split_adapter
from bdm.formats.checkpoint import load_controlnet, read_parts
from bdm.weights import read_tensors, read_weights

KEY = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def test_checkpoint_round_trip(pipe, tmp_path):
    write_original(pipe, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", "diffusers")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    same(stock.unet.state_dict(), pipe.unet.state_dict())
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "original")
    same(read_tensors(tmp_path / "b.safetensors"), read_tensors(tmp_path / "a.safetensors"))
    same(read_parts(tmp_path / "b.safetensors").weights["vae"], pipe.vae.state_dict())


def test_precision_is_changed_on_request(pipe, tmp_path):
    write_original(pipe, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "half.safetensors", "original", torch.float16)
    assert {t.dtype for t in read_tensors(tmp_path / "half.safetensors").values()} == {torch.float16}


def test_controlnet_round_trip(unet, tmp_path):
    controlnet = make_controlnet(unet)
    controlnet.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "original")
    assert "control_model.input_hint_block.0.weight" in read_tensors(tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    same(load_controlnet(tmp_path / "c").state_dict(), controlnet.state_dict())


def test_branch_between_ours_and_the_released_form(branch, tmp_path):
    branch.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "released", "BDM")
    assert json.loads((tmp_path / "released" / "config.json").read_text())["_class_name"] == "ControlNetModelBDM"
    convert(tmp_path / "released", tmp_path / "again", "diffusers")
    same(BranchModel.from_pretrained(tmp_path / "again").state_dict(), branch.state_dict())


def test_vae_round_trip(pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "original")
    convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    same(read_tensors(tmp_path / "c" / "diffusion_pytorch_model.safetensors"), pipe.vae.state_dict())


def test_adapter_round_trip_keeps_the_change(tmp_path):
    torch.manual_seed(2)
    path = tmp_path / "kohya.safetensors"
    down, up = f"lora_unet_{KEY}.lora_down.weight", f"lora_unet_{KEY}.lora_up.weight"
    tensors = {down: torch.randn(4, 768), up: torch.randn(320, 4)}
    save_file(tensors | {f"lora_unet_{KEY}.alpha": torch.tensor(2.0)}, path, {"ss_network_dim": "4"})
    convert(path, tmp_path / "diffusers.safetensors", "diffusers")
    keys = read_tensors(tmp_path / "diffusers.safetensors")
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in keys
    convert(tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors", "kohya")
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = torch.zeros(320, 768)
    changes = [
        split_adapter(read_weights(tmp_path / f"{name}.safetensors"), {"unet": [module, "down_blocks.0.resnets.0.conv1"]})["unet"][
            module
        ].weight(weight)
        for name in ("kohya", "diffusers", "back")
    ]
    torch.testing.assert_close(changes[1], changes[0])
    torch.testing.assert_close(changes[2], changes[0])
    assert changes[0].abs().max() > 1
    assert read_weights(tmp_path / "back.safetensors").metadata["ss_network_dim"] == "4"


def test_diffusers_reads_the_converted_adapter(tmp_path):
    """diffusers' own loader gives the same output with the file we wrote."""
    torch.manual_seed(2)
    unet = make_unet(cross_attention_dim=768)
    path = tmp_path / "kohya.safetensors"
    save_file(
        {f"lora_unet_{KEY}.lora_down.weight": torch.randn(4, 768), f"lora_unet_{KEY}.lora_up.weight": torch.randn(16, 4)}
        | {f"lora_unet_{KEY}.alpha": torch.tensor(2.0)},
        path,
    )  # fmt: skip
    convert(path, tmp_path / "diffusers.safetensors", "diffusers")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 768)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    ours = make_unet(cross_attention_dim=768)
    ours.load_state_dict(unet.state_dict())
    layer = ours.get_submodule(module)
    layer.weight.data += split_adapter(read_weights(path), {"unet": [module, "down_blocks.0.resnets.0.conv1"]})["unet"][
        module
    ].weight(layer.weight.data)
    state = {k.removeprefix("unet."): v for k, v in read_tensors(tmp_path / "diffusers.safetensors").items()}
    unet.load_lora_adapter(state, prefix=None)
    torch.testing.assert_close(ours(x, 5, text).sample, unet(x, 5, text).sample, atol=1e-5, rtol=1e-4)


def test_embedding_round_trip(tmp_path):
    vectors = torch.randn(3, TEXT_DIM)
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "calm.pt")
    convert(tmp_path / "calm.pt", tmp_path / "calm.safetensors", "A1111")
    convert(tmp_path / "calm.safetensors", tmp_path / "out" / "calm.safetensors", "diffusers")
    assert torch.equal(read_tensors(tmp_path / "out" / "calm.safetensors")["calm"], vectors)


@pytest.mark.parametrize(
    ("out", "layout", "message"),
    [
        ("b.safetensors", "kohya", "allowed: original, diffusers"),
        ("b", "original", "ends in .safetensors"),
        ("b.bin", "diffusers", "folder"),
    ],
)
def test_impossible_conversions_write_nothing(pipe, tmp_path, out, layout, message):
    write_original(pipe, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "out" / out, layout)
    assert not (tmp_path / "out").exists()
