"""Names, single files and identification, against diffusers' own converters."""

import json

import pytest
import torch
from agreement import outputs_agree
from community_files import make_controlnet, same, write_original
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_unet, make_vae

from bdm.errors import UserError
from bdm.formats import names
from bdm.formats.checkpoint import (
    CONFIG_KEY,
    load_controlnet,
    read_parts,
    read_vae,
)
from bdm.formats.configs import text_config, unet_config, vae_config
from bdm.formats.identify import describe_file, file_hashes, identify, identify_source, require, source_hash
from bdm.formats.weights import read_weights, read_weights_folder
from bdm.models.backbone import load_backbone


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"layers_per_block": 1},
        {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (16, 32),
        },
    ],
)
def test_unet_names_are_diffusers_own(build):
    weights = make_unet(**build).state_dict()
    original = names.unet_to_original(weights)
    assert {"input_blocks.1.0.in_layers.0.weight", "out.2.weight"} <= original.keys()
    same(names.unet_to_diffusers(original), weights)
    layers = build.get("layers_per_block", 2)
    theirs = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": v for k, v in original.items()},
        {"layers_per_block": layers, **unet_config(weights)},
    )
    same(theirs, weights)


def test_vae_names_are_diffusers_own():
    vae = make_vae()
    original = names.vae_to_original(vae.state_dict())
    assert original["encoder.mid.attn_1.q.weight"].ndim == 4
    theirs = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{k}": v for k, v in original.items()}, vae.config
    )
    same(names.vae_to_diffusers(original), vae.state_dict())
    same(theirs, vae.state_dict())


def test_vae_names_of_old_diffusers():
    vae = make_vae()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in vae.state_dict().items():
        for new, before in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[key] = tensor
    same(names.vae_to_diffusers(renamed), vae.state_dict())


def test_controlnet_names_are_diffusers_own(unet):
    controlnet = make_controlnet(unet)
    original = names.controlnet_to_original(controlnet.state_dict())
    assert {"input_hint_block.14.weight", "middle_block_out.0.weight"} <= original.keys()
    same(names.controlnet_to_diffusers(original), controlnet.state_dict())
    theirs = convert_controlnet_checkpoint(
        {f"control_model.{k}": v for k, v in original.items()}, {"layers_per_block": 2}
    )
    same(theirs, controlnet.state_dict())


def test_single_file_gives_the_same_models(pipe, tmp_path):
    write_original(pipe, tmp_path / "model.safetensors")
    backbone = load_backbone(tmp_path / "model.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        same(getattr(backbone, part).state_dict(), getattr(pipe, part).state_dict())
    ids = torch.arange(77)[None]
    outputs_agree(backbone.text_encoder(ids).last_hidden_state, pipe.text_encoder(ids).last_hidden_state)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 77, TEXT_DIM)
    outputs_agree(backbone.unet(x, t, text).sample, pipe.unet(x, t, text).sample)


def test_configurations_are_read_off_the_shapes(pipe):
    unet = make_unet(block_out_channels=(32, 64, 64, 64), norm_num_groups=32, attention_head_dim=8)
    for config, model in (
        (unet_config(unet.state_dict()), unet),
        (vae_config(pipe.vae.state_dict()), pipe.vae),
    ):
        for key, value in config.items():
            if key not in ("sample_size", "scaling_factor"):
                assert (
                    tuple(model.config[key]) == value
                    if isinstance(value, tuple)
                    else model.config[key] == value
                ), key
    config = text_config(names.text_to_plain(pipe.text_encoder.state_dict()))
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (
        TEXT_DIM,
        2,
        32,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_of_the_file_is_kept_or_changed(pipe, tmp_path, dtype):
    write_original(pipe, tmp_path / "model.safetensors", dtype=dtype)
    assert load_backbone(tmp_path / "model.safetensors", None).unet.dtype == dtype
    assert load_backbone(tmp_path / "model.safetensors").unet.dtype == torch.float32


def test_old_pickled_checkpoint(pipe, tmp_path):
    tensors, metadata = write_original(pipe, tmp_path / "model.safetensors")
    state = dict(tensors)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77.0)[None]
    state["model_ema.num_updates"] = torch.tensor(7)
    # A trainer's callback class as a key, as in the first published files.
    module, name = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
    callback = type(name, (), {"__module__": module})
    content = {
        "state_dict": state,
        "global_step": 7,
        "callbacks": {callback: {"best": "x"}},
        CONFIG_KEY: metadata[CONFIG_KEY],
    }
    import sys
    import types

    fake = types.ModuleType(module)
    setattr(fake, name, callback)
    parents = [types.ModuleType("pytorch_lightning"), types.ModuleType("pytorch_lightning.callbacks")]
    sys.modules.update({m.__name__: m for m in (*parents, fake)})
    try:
        torch.save(content, tmp_path / "model.ckpt")
        torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    finally:
        for m in (*parents, fake):
            del sys.modules[m.__name__]
    for file in ("model.ckpt", "old.ckpt"):
        same(read_parts(tmp_path / file).weights["unet"], pipe.unet.state_dict())
        assert (
            read_parts(tmp_path / file).weights["text_encoder"].keys()
            == names.text_to_plain(pipe.text_encoder.state_dict()).keys()
        )


def test_file_with_averaged_weights_only(pipe, tmp_path):
    tensors, metadata = write_original(pipe, tmp_path / "model.safetensors")
    averaged = {
        (
            "model_ema." + key.removeprefix("model.").replace(".", "")
            if key.startswith("model.diffusion_model.")
            else key
        ): tensor
        for key, tensor in tensors.items()
    }
    save_file(averaged, tmp_path / "ema.safetensors", metadata)
    same(read_parts(tmp_path / "ema.safetensors").weights["unet"], pipe.unet.state_dict())


def test_file_without_vae(pipe, tmp_path):
    tensors, metadata = write_original(pipe, tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("first_stage")},
        tmp_path / "pruned.safetensors",
        metadata,
    )
    with pytest.raises(UserError, match="holds no vae"):
        load_backbone(tmp_path / "pruned.safetensors")
    pipe.vae.save_pretrained(tmp_path / "vae")
    same(
        load_backbone(tmp_path / "pruned.safetensors", vae=tmp_path / "vae").vae.state_dict(),
        pipe.vae.state_dict(),
    )


@pytest.mark.parametrize(
    ("key", "shape", "base"),
    [
        ("model.diffusion_model.label_emb.0.0.weight", (8, 8), "SDXL"),
        ("cond_stage_model.model.ln_final.weight", (8,), "SD2"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", (8, 8), "SD3"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", (8, 8), "FLUX"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, key, shape, base):
    tensors = {
        key: torch.zeros(shape),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"made for {base}"):
        load_backbone(tmp_path / "model.safetensors")


def test_inpainting_checkpoint_is_refused_by_name(tmp_path):
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="SD1.5 inpainting"):
        load_backbone(tmp_path / "model.safetensors")


def test_kinds_are_told_from_names(pipe, tmp_path):
    tensors, _ = write_original(pipe, tmp_path / "model.safetensors")
    controlnet = make_controlnet(pipe.unet)
    found = {
        "checkpoint": tensors,
        "unet": pipe.unet.state_dict(),
        "vae": pipe.vae.state_dict(),
        "text encoder": pipe.text_encoder.state_dict(),
        "controlnet": controlnet.state_dict(),
        "branch": pipe.branch.state_dict(),
        "embedding": {"emb_params": torch.zeros(2, 768)},
        "adapter": {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 8),
            "x.lora_up.weight": torch.zeros(8, 4),
        },
        "unknown": {"layer.0.kernel": torch.zeros(3, 3, 3)},
    }
    for kind, weights in found.items():
        assert identify(weights).kind == kind
    assert identify({"<cat>": torch.zeros(768)}).base == "SD1.5"
    assert identify({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}).base == "SDXL"
    pipe.save_pretrained(tmp_path / "folder")
    assert identify_source(tmp_path / "folder").kind == "checkpoint"
    assert identify_source(tmp_path / "folder" / "branch").kind == "branch"


def test_file_that_holds_a_checkpoint_and_a_control_is_a_controlnet(pipe, tmp_path):
    """The first published ControlNets, control_sd15_*.pth."""
    tensors, _ = write_original(pipe, tmp_path / "model.safetensors")
    controlnet = make_controlnet(
        make_unet(block_out_channels=(32, 32, 32, 32), norm_num_groups=32, attention_head_dim=8)
    )
    control = {
        f"control_model.{k}": v for k, v in names.controlnet_to_original(controlnet.state_dict()).items()
    }
    torch.save({"state_dict": tensors | control}, tmp_path / "control_sd15_canny.pth")
    assert identify_source(tmp_path / "control_sd15_canny.pth").kind == "controlnet"
    same(load_controlnet(tmp_path / "control_sd15_canny.pth").state_dict(), controlnet.state_dict())


def test_vae_with_what_its_training_left(pipe, tmp_path):
    original = names.vae_to_original(pipe.vae.state_dict())
    remains = {
        "model_ema.decay": torch.tensor(0.999),
        "loss.logvar": torch.zeros(()),
        "loss.perceptual_loss.x": torch.zeros(3),
    }
    torch.save({"state_dict": original | remains}, tmp_path / "vae.ckpt")
    same(read_vae(tmp_path / "vae.ckpt").weights["vae"], pipe.vae.state_dict())


def test_checkpoint_with_numpy_counters(pipe, tmp_path):
    import numpy as np

    tensors, metadata = write_original(pipe, tmp_path / "model.safetensors")
    content = {
        "state_dict": tensors,
        "best": np.float64(0.5),
        "epochs": np.arange(3),
        CONFIG_KEY: metadata[CONFIG_KEY],
    }
    torch.save(content, tmp_path / "model.ckpt")
    same(read_parts(tmp_path / "model.ckpt").weights["unet"], pipe.unet.state_dict())


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".SAFETENSORS"])
def test_safetensors_under_another_ending(tmp_path, ending):
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / f"a{ending}")
    assert identify_source(tmp_path / f"a{ending}").kind == "embedding"


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("FluxPipeline", "made for FLUX"),
        ("StableDiffusion3Pipeline", "made for SD3"),
        ("KolorsPipeline", "is Kolors, which is SDXL-shaped"),
    ],
)
def test_folders_of_other_families(tmp_path, pipeline, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UserError, match=message):
        load_backbone(tmp_path)


def test_folder_with_a_missing_shard(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x-00001.safetensors"}})
    )
    with pytest.raises(UserError, match="lacks 1 of the 1 files"):
        read_weights_folder(tmp_path)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": (4, 8)}, "SD3"),
        ({"lora_unet_single_blocks_7_linear2.lora_down.weight": (4, 8)}, "FLUX"),
        ({"double_blocks.0.img_attn.proj.weight": (8, 8), "img_in.weight": (8, 8), "x.bias": (3,)}, "FLUX"),
        (
            {"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3), "encoder.conv_out.weight": (32, 8, 3, 3)},
            "16 latent channels",
        ),
        (
            {"model.0.weight": (8, 8, 3, 3), "model.0.bias": (8,), "model.2.weight": (8, 8, 3, 3)},
            "unknown kind",
        ),
    ],
)
def test_foreign_files_are_named(tmp_path, weights, text):
    save_file({key: torch.zeros(shape) for key, shape in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=text):
        require(
            identify_source(tmp_path / "a.safetensors"), ("checkpoint", "adapter", "vae"), "a.safetensors"
        )


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lokr_w1",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2.weight",
        "unet.mid_block.attentions.0.transformer_blocks.3.attn1.to_q.lora_A.weight",
    ],
)
def test_adapters_of_sdxl_are_named_without_its_text_width(tmp_path, key):
    tensors = {
        key: torch.zeros(4, 4),
        key.replace("_1_attn1", "_0_attn1").replace(".3.", ".0."): torch.zeros(4, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="made for SDXL"):
        require(identify_source(tmp_path / "a.safetensors"), ("adapter",), "a.safetensors")


def test_adapters_of_sd15_are_not_taken_for_sdxl():
    modules = [name.removesuffix(".weight") for name in make_unet().state_dict() if name.endswith(".weight")]
    keys = [f"lora_unet_{name.replace('.', '_')}.lora_down.weight" for name in modules]
    assert identify({key: torch.zeros(4, 4) for key in keys if "attn2" not in key}).base == ""


def test_embedding_whose_token_has_a_dot():
    assert identify({"<style-v1.5>": torch.zeros(768)}).kind == "embedding"


@pytest.mark.parametrize("key", ["input_blocks.300000.0.weight", "input_blocks." + "9" * 4000 + ".0.weight"])
def test_block_numbers_that_lie(key):
    with pytest.raises(UserError):
        names.unet_to_diffusers(
            {
                key: torch.zeros(1),
                "input_blocks.0.0.weight": torch.zeros(1),
                "input_blocks.3.0.x": torch.zeros(1),
            }
        )


def test_description_loads_no_values(tmp_path, monkeypatch):
    class HeaderOnly:
        """An opened file that gives no tensors."""

        def __init__(self, *arguments, **options):
            self.file = safe_open(*arguments, **options)

        def __enter__(self):
            self.metadata = self.file.__enter__().metadata
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

    path = tmp_path / "calm.safetensors"
    save_file({"emb_params": torch.zeros(2, 768)}, path)
    monkeypatch.setattr("bdm.formats.weights.safe_open", HeaderOnly)
    assert describe_file(path)["vectors"] == "2"
    with pytest.raises(AttributeError):
        read_weights(path)
    torch.save({"emb_params": torch.zeros(2, 768)}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt", header_only=True).tensors["emb_params"].is_meta


def test_description_hashes_as_a1111_does(tmp_path):
    import hashlib

    weights = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.randn(
            4, 768
        ),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.randn(
            320, 4
        ),
    }
    tags = json.dumps({"10_ink": {"ink style": 12, "tree": 3}})
    path = tmp_path / "ink.safetensors"
    save_file(weights, path, {"ss_network_dim": "4", "ss_tag_frequency": tags})
    facts = describe_file(path)
    assert (facts["kind"], facts["base"], facts["form"], facts["ranks"]) == ("adapter", "SD1.5", "LoRA", "4")
    assert facts["noted trigger words"] == "ink style, tree"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert facts["model hash"] == hashlib.sha256(content).hexdigest()[:10]
    assert facts["data hash"] == hashlib.sha256(content[start:]).hexdigest()[:12]
    assert file_hashes(path)["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("ending", "value", "form", "ranks"),
    [
        ("lora_magnitude_vector", torch.ones(320), "DoRA", None),
        ("dora_scale", torch.ones(320, 1), "DoRA", None),
        ("lokr_w1_b", torch.zeros(3, 8), None, "3"),
        ("lokr_w2_b", torch.zeros(4, 8), None, "4"),
        ("lokr_w1_a", torch.zeros(8, 3), "LoKr", None),
    ],
)
def test_description_of_an_adapter(tmp_path, ending, value, form, ranks):
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{module}.{ending}": value, f"{module}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    facts = describe_file(tmp_path / "a.safetensors")
    assert facts["kind"] == "adapter"
    assert facts["form"] == (form or "")
    assert facts.get("ranks") == ranks


def test_hash_of_a_folder_is_that_of_the_weights_that_are_read(tmp_path):
    """Sharded or whole; a folder's other files make no difference."""
    hashes = set()
    for value in (0.0, 1.0):
        folder = tmp_path / str(value)
        (folder / "unet").mkdir(parents=True)
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for i, name in enumerate(names):
            save_file({f"w{i}": torch.full((2,), value + i)}, folder / "unet" / name)
        index = json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}})
        (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        hashes.add(source_hash(folder))
        (folder / "unet" / "notes.safetensors").write_bytes(b"x")
        hashes.add(source_hash(folder))
    assert len(hashes) == 2
    save_file({"w0": torch.zeros(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert source_hash(folder) not in hashes, "a whole file is preferred to shards"
    assert read_weights_folder(folder / "unet").keys() == {"w0"}


@pytest.mark.parametrize("layout", ["diffusers file", "original file", "folder"])
def test_controlnet_from_every_form(unet, tmp_path, layout):
    unet = make_unet(block_out_channels=(32, 32, 32, 32), norm_num_groups=32, attention_head_dim=8)
    controlnet = make_controlnet(unet)
    path = tmp_path / "control"
    if layout == "folder":
        controlnet.save_pretrained(path)
    elif layout == "diffusers file":
        path = tmp_path / "control.safetensors"
        save_file({k: v.contiguous() for k, v in controlnet.state_dict().items()}, path)
    else:
        path = tmp_path / "control.pth"
        original = names.controlnet_to_original(controlnet.state_dict())
        torch.save({f"control_model.{k}": v for k, v in original.items()}, path)
    loaded = load_controlnet(path)
    same(loaded.state_dict(), controlnet.state_dict())
    arguments = (
        torch.randn(1, 4, 16, 16),
        torch.tensor(3),
        torch.randn(1, 5, TEXT_DIM),
        torch.rand(1, 3, 128, 128),
    )
    for ours, theirs in zip(loaded(*arguments)[0], controlnet(*arguments)[0], strict=True):
        outputs_agree(ours, theirs)
