"""Conversions are round trips, and what comes out loads elsewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from community_files import make_controlnet, same, write_original
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_unet

from bdm.convert import convert
from bdm.errors import UserError
from bdm.formats.adapter import split_adapter
from bdm.formats.checkpoint import CONFIG_KEY, load_controlnet, read_parts
from bdm.formats.configs import differs
from bdm.formats.names import UNetBuild, rename, to_original, vae_to_original
from bdm.formats.weights import read_tensors, read_weights
from bdm.method.branch import BranchModel
from bdm.models.backbone import load_backbone

KEY = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


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
    assert (
        json.loads((tmp_path / "released" / "config.json").read_text())["_class_name"] == "ControlNetModelBDM"
    )
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
        split_adapter(
            read_weights(tmp_path / f"{name}.safetensors"),
            {"unet": [module, "down_blocks.0.resnets.0.conv1"]},
        )["unet"][module].weight(weight)
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
        {
            f"lora_unet_{KEY}.lora_down.weight": torch.randn(4, 768),
            f"lora_unet_{KEY}.lora_up.weight": torch.randn(16, 4),
        }
        | {f"lora_unet_{KEY}.alpha": torch.tensor(2.0)},
        path,
    )
    convert(path, tmp_path / "diffusers.safetensors", "diffusers")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 768)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    ours = make_unet(cross_attention_dim=768)
    ours.load_state_dict(unet.state_dict())
    layer = ours.get_submodule(module)
    layer.weight.data += split_adapter(
        read_weights(path), {"unet": [module, "down_blocks.0.resnets.0.conv1"]}
    )["unet"][module].weight(layer.weight.data)
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


@pytest.mark.parametrize("out", ["mine", "."])
def test_folders_with_other_files_stay_as_they_are(branch, tmp_path, monkeypatch, out):
    branch.save_pretrained(tmp_path / "branch")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="files in it, which stay"):
        convert(tmp_path / "branch", Path(out), "BDM")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"


def test_an_empty_folder_is_filled(branch, tmp_path):
    branch.save_pretrained(tmp_path / "branch")
    (tmp_path / "new").mkdir()
    convert(tmp_path / "branch", tmp_path / "new", "BDM")
    same(BranchModel.from_pretrained(tmp_path / "new").state_dict(), branch.state_dict())


def test_pruned_file_whose_header_says_more_than_it_holds(pipe, tmp_path):
    tensors, metadata = write_original(pipe, tmp_path / "whole.safetensors")
    noted = json.loads(metadata[CONFIG_KEY]) | {"watermark": {"size": 3}}
    pruned = {
        key: tensor.contiguous()
        for key, tensor in tensors.items()
        if not key.startswith("first_stage_model.")
    }
    save_file(pruned, tmp_path / "pruned.safetensors", {CONFIG_KEY: json.dumps(noted)})
    convert(tmp_path / "pruned.safetensors", tmp_path / "out.safetensors", "original")
    same(read_tensors(tmp_path / "out.safetensors"), pruned)
    assert json.loads(read_weights(tmp_path / "out.safetensors").metadata[CONFIG_KEY]).keys() == {
        "unet",
        "text_encoder",
    }


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("key", ["conv_in.weight", "mid_block.resnets.0.conv1.bias"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_incomplete_checkpoints_are_not_copied(pipe, tmp_path, source, key, damage):
    weights = dict(pipe.unet.state_dict())
    if damage == "missing":
        del weights[key]
    else:
        weights[key] = weights[key][:3].clone()
    config = json.loads(pipe.unet.to_json_string())
    if source == "folder":
        path = tmp_path / "model"
        pipe.unet.save_pretrained(path / "unet")
        (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        save_file(weights, path / "unet" / "diffusion_pytorch_model.safetensors")
    else:
        path = tmp_path / "model.safetensors"
        table = to_original(UNetBuild.of(weights).unet())
        original = {f"model.diffusion_model.{k}": v for k, v in rename(weights, table).items()}
        save_file(original, path, {CONFIG_KEY: json.dumps({"unet": config})})
    with pytest.raises(UserError, match=rf"{key}|unknown names"):
        convert(path, tmp_path / "out.safetensors", "original")
    assert not list(tmp_path.glob("*out*"))


def save_adapter(path, factors):
    """An adapter's file: its factors, by their endings, on one module."""
    save_file({f"lora_unet_{KEY}.{ending}": tensor for ending, tensor in factors.items()}, path)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "factors",
    [
        {"lora_down.weight": (4, 768)},
        {"lora_up.weight": (320, 4)},
        {"lora_magnitude_vector": (320,), "alpha": ()},
        {"lora_down.weight": (), "lora_up.weight": (320, 4)},
        {"lora_down.weight": (4, 768), "lora_up.weight": (320, 4), "alpha": (2,)},
        {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4)},
    ],
)
def test_incomplete_adapters_are_not_copied(tmp_path, layout, factors):
    save_adapter(tmp_path / "a.safetensors", {ending: torch.ones(shape) for ending, shape in factors.items()})
    with pytest.raises(UserError, match=r"incomplete|damaged|no names"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout)
    assert not list(tmp_path.glob("*b.safetensors*"))


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_of_peft_becomes_lycoris_own(tmp_path, on_input):
    """LyCORIS' own module, given the converted weights, computes what peft's factor means."""
    from lycoris.modules.ia3 import IA3Module

    factor = 1 + 0.3 * torch.randn((1, 768) if on_input else (320, 1))
    save_file({f"unet.{MODULE}.ia3_l": factor}, tmp_path / "peft.safetensors")
    convert(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "kohya")
    written = read_tensors(tmp_path / "kohya.safetensors")
    assert written.keys() == {f"lora_unet_{KEY}.weight", f"lora_unet_{KEY}.on_input"}
    layer = torch.nn.Linear(768, 320, bias=False)
    module = IA3Module(f"lora_unet_{KEY}", layer, train_on_input=bool(written[f"lora_unet_{KEY}.on_input"]))
    module.weight.data.copy_(written[f"lora_unet_{KEY}.weight"])
    torch.testing.assert_close(module.get_merged_weight()[0], layer.weight * factor)
    changes = [
        split_adapter(
            read_weights(tmp_path / f"{name}.safetensors"),
            {"unet": [MODULE, "down_blocks.0.resnets.0.conv1"]},
        )
        for name in ("peft", "kohya")
    ]
    ours, theirs = (change["unet"][MODULE].weight(layer.weight.detach()) for change in changes)
    torch.testing.assert_close(ours, theirs)


def test_ia3_that_scales_a_bias_has_no_kohya_form(tmp_path):
    save_file(
        {f"unet.{MODULE.replace('to_k', 'to_out.0')}.ia3_l": torch.ones(320, 1)},
        tmp_path / "peft.safetensors",
    )
    with pytest.raises(UserError, match="with their bias"):
        convert(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "kohya")


def test_a_disk_that_is_full_is_named(branch, tmp_path, monkeypatch):
    """safetensors hands an error of the operating system on as one of its own."""
    torch.save({"string_to_param": {"*": torch.ones(1, TEXT_DIM)}}, tmp_path / "calm.pt")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("bdm.convert.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        convert(tmp_path / "calm.pt", tmp_path / "b.safetensors", "A1111")
    assert [path.name for path in tmp_path.iterdir()] == ["calm.pt"]


TEXT = "cond_stage_model.transformer.text_model"
LARGE = {torch.float16: 1e5, torch.bfloat16: 3.4e38}


def written_with(pipe, kind, key, value, path):
    """A file of a kind, one of whose values is large."""
    if kind == "adapter":
        tensors = {f"lora_unet_{KEY}.lora_down.weight": torch.randn(4, 768),
                   f"lora_unet_{KEY}.lora_up.weight": torch.randn(320, 4),
                   "bundle_emb.mood.emb_params": torch.randn(2, 768)}  # fmt: skip
        metadata = {}
    elif kind == "embedding":
        tensors, metadata = {"emb_params": torch.randn(2, 768)}, {}
    elif kind == "controlnet":
        controlnet = make_controlnet(pipe.unet)
        tensors = {k: v.clone().contiguous() for k, v in controlnet.state_dict().items()}
        metadata = {CONFIG_KEY: json.dumps({"controlnet": json.loads(controlnet.to_json_string())})}
    elif kind == "vae":
        tensors = {k: v.clone().contiguous() for k, v in vae_to_original(pipe.vae.state_dict()).items()}
        metadata = {CONFIG_KEY: json.dumps({"vae": json.loads(pipe.vae.to_json_string())})}
    else:
        tensors, metadata = write_original(pipe, path)
        tensors = {k: v.clone().contiguous() for k, v in tensors.items()}
    tensors[key].view(-1)[-1] = value
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize(
    ("kind", "key", "layout", "named"),
    [
        ("adapter", f"lora_unet_{KEY}.lora_down.weight", "kohya", f"{KEY}.lora_down.weight"),
        ("adapter", f"lora_unet_{KEY}.lora_up.weight", "diffusers", f"{MODULE}.lora_B.weight"),
        ("adapter", "bundle_emb.mood.emb_params", "kohya", "bundle_emb.mood.emb_params"),
        ("embedding", "emb_params", "A1111", "emb_params"),
        ("embedding", "emb_params", "diffusers", "a holds"),
        ("vae", "decoder.conv_out.bias", "original", "decoder.conv_out.bias"),
        ("vae", "decoder.conv_out.bias", "diffusers", "decoder.conv_out.bias"),
        ("controlnet", "controlnet_mid_block.bias", "original", "control_model.middle_block_out.0.bias"),
        ("controlnet", "controlnet_mid_block.bias", "diffusers", "controlnet_mid_block.bias"),
        ("checkpoint", "model.diffusion_model.out.2.bias", "original", "model.diffusion_model.out.2.bias"),
        ("checkpoint", "model.diffusion_model.out.2.bias", "diffusers", "(unet): conv_out.bias"),
        ("checkpoint", f"{TEXT}.final_layer_norm.bias", "original", f"{TEXT}.final_layer_norm.bias"),
    ],
)
def test_values_that_leave_a_precision_are_refused(pipe, tmp_path, kind, key, layout, named, dtype):
    path = written_with(pipe, kind, key, LARGE[dtype], tmp_path / "a.safetensors")
    out = tmp_path / (
        "out" if layout == "diffusers" and kind not in ("adapter", "embedding") else "b.safetensors"
    )
    precision = str(dtype).removeprefix("torch.")
    message = f"holds {LARGE[dtype]:g}, and {precision} ends at"
    with pytest.raises(UserError, match=rf"a\.safetensors.* {re.escape(message)} .*; choose") as raised:
        convert(path, out, layout, dtype)
    assert named in str(raised.value)
    assert not out.exists()
    if layout != "diffusers":
        convert(path, out, layout, torch.float32)
        assert all(t.isfinite().all() for t in read_tensors(out).values())


def test_a_scale_that_leaves_a_precision_is_refused(tmp_path):
    """diffusers has no alpha: it is multiplied into a factor that was half precision before."""
    tensors = {
        f"lora_unet_{KEY}.lora_down.weight": torch.randn(4, 768).half(),
        f"lora_unet_{KEY}.lora_up.weight": torch.full((320, 4), 300.0).half(),
        f"lora_unet_{KEY}.alpha": torch.tensor(1000.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="times alpha holds 75000, and float16"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")


def test_values_too_small_for_a_precision_are_named(tmp_path, caplog):
    tensors = {
        f"lora_unet_{KEY}.lora_down.weight": torch.randn(4, 768),
        f"lora_unet_{KEY}.lora_up.weight": torch.full((320, 4), 1e-9),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", torch.bfloat16)
    assert not caplog.records
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", torch.float16)
    (record,) = caplog.records
    assert "1 tensors hold values too small for float16" in record.message
    assert "lora_up" in record.message


def test_loading_refuses_them_too(pipe, tmp_path):
    key = "model.diffusion_model.out.2.bias"
    path = written_with(pipe, "checkpoint", key, 1e5, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="conv_out.bias holds 100000, and float16"):
        load_backbone(path, torch.float16)
    assert load_backbone(path, torch.bfloat16).unet.dtype == torch.bfloat16
    pipe.branch.controlnet_mid_block.bias.data[0] = 1e5
    pipe.branch.save_pretrained(tmp_path / "branch")
    with pytest.raises(UserError, match="controlnet_mid_block.bias holds 100000"):
        BranchModel.from_pretrained(tmp_path / "branch", torch_dtype=torch.float16)


def test_vae_files_with_something_unknown_beside_it(pipe, tmp_path):
    tensors = {
        f"first_stage_model.{k}": v.contiguous() for k, v in vae_to_original(pipe.vae.state_dict()).items()
    }
    save_file(tensors | {"latents_mean": torch.zeros(4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="'latents_mean', and what that means"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "original")


@pytest.mark.parametrize(
    ("part", "setting"),
    [("unet", {"act_fn": "gelu"}), ("unet", {"flip_sin_to_cos": False}), ("unet", {"norm_eps": 1e-3}),
     ("vae", {"shift_factor": 0.1}), ("vae", {"scaling_factor": 0.2}), ("vae", {"act_fn": "relu"})],
)  # fmt: skip
def test_settings_that_no_weight_tells_are_kept(part, setting):
    """Of a network that is SD1.5's but for one setting."""
    with init_empty_weights():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        )  # fmt: skip
    model = {"unet": unet, "vae": vae}[part]
    config = json.loads(model.to_json_string())
    assert not differs(part, config, model.state_dict())
    assert differs(part, config | setting, model.state_dict())
