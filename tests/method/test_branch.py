import json
import pickle

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from tiny import NATIVE_DIM, TEXT_DIM, make_branch, make_unet

from bdm.errors import UserError
from bdm.method.branch import BranchModel


@pytest.mark.parametrize(("width", "parameters"), [(1024, 363_141_760), (768, 360_192_640)])
def test_sd15_size_is_the_released_one(width, parameters):
    with torch.device("meta"):
        branch = BranchModel(cross_attention_dim=width)
    assert sum(p.numel() for p in branch.parameters()) == parameters
    keys = branch.state_dict().keys()
    assert len(keys) == 324
    assert not list(branch.buffers())
    with torch.device("meta"):
        controlnet = ControlNetModel(cross_attention_dim=width)
    assert keys == {k for k in controlnet.state_dict() if not k.startswith("controlnet_cond_embedding")}


def test_outputs_equal_a_controlnet_without_condition_image(unet):
    branch = make_branch(unet, TEXT_DIM)
    controlnet = ControlNetModel.from_unet(unet)
    controlnet.load_state_dict(branch.state_dict(), strict=False)
    torch.nn.init.zeros_(controlnet.controlnet_cond_embedding.conv_out.weight)
    torch.nn.init.zeros_(controlnet.controlnet_cond_embedding.conv_out.bias)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 7, TEXT_DIM)
    ours = branch(x, t, text, conditioning_scale=0.7)
    theirs = controlnet(x, t, text, torch.randn(2, 3, 64, 64), conditioning_scale=0.7)
    assert len(ours.down_block_res_samples) == 12
    for a, b in zip(ours.down_block_res_samples, theirs.down_block_res_samples, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.mid_block_res_sample, theirs.mid_block_res_sample, atol=1e-6, rtol=0)


def test_from_backbone_copies_all_but_what_cannot_fit(unet):
    branch = BranchModel.from_backbone(unet, NATIVE_DIM)
    backbone, own = unet.state_dict(), branch.state_dict()
    differing = {
        k
        for k in own
        if not k.startswith("controlnet_") and not torch.equal(own[k], backbone.get(k, torch.empty(0)))
    }
    assert differing
    assert all(k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for k in differing)
    same_width = BranchModel.from_backbone(unet).state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in same_width.items() if not k.startswith("controlnet_"))


def test_save_and_load_round_trip(branch, tmp_path):
    branch.save_pretrained(tmp_path)
    loaded = BranchModel.from_pretrained(tmp_path)
    assert all(
        loaded.config[k] == (list(v) if isinstance(v, tuple) else v)
        for k, v in branch.config.items()
        if not k.startswith("_")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(branch.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def write_released(branch, folder, name="diffusion_pytorch_model.bin"):
    """A folder as the authors released it.

    ControlNet's configuration under their class name, a pickle of tensors.
    """
    config = ControlNetModel.from_unet(make_unet()).config
    config = {k: v for k, v in config.items() if not k.startswith("_")} | {"cross_attention_dim": NATIVE_DIM}
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModelBDM"}))
    torch.save(branch.state_dict(), folder / name)


def test_released_folder_loads_as_it_is(branch, tmp_path):
    write_released(branch, tmp_path)
    loaded = BranchModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(branch.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_that_names_more_than_tensors_is_refused(branch, tmp_path):
    write_released(branch, tmp_path)
    victim = tmp_path / "victim"
    with open(tmp_path / "diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump({"conv_in.weight": Malicious(victim)}, file)
    with pytest.raises(UserError, match="more than tensors|damaged"):
        BranchModel.from_pretrained(tmp_path)
    torch.save({"conv_in.weight": Malicious(victim)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        BranchModel.from_pretrained(tmp_path)
    assert not victim.exists()


def test_damaged_and_unfitting_files_are_named(branch, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        BranchModel.from_pretrained(tmp_path / "nothing")
    branch.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        BranchModel.from_pretrained(tmp_path)
    state = branch.state_dict()
    save_file({k: v for k, v in state.items() if k != "conv_in.bias"}, weights)
    with pytest.raises(UserError, match=r"lacks 1 of the branch's 322 weights, such as 'conv_in\.bias'"):
        BranchModel.from_pretrained(tmp_path)
    save_file(state | {"controlnet_cond_embedding.conv_in.weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="is it a ControlNet"):
        BranchModel.from_pretrained(tmp_path)
    save_file(state | {"conv_in.bias": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"'conv_in\.bias' has shape \(3,\)"):
        BranchModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(use_linear_projection=True), "SD2"),
        (dict(in_channels=9), "inpainting"),
        (
            dict(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=80,
            ),
            "SDXL",
        ),
    ],
)
def test_other_backbones_are_refused_by_name(changes, name):
    with pytest.raises(UserError, match=name):
        BranchModel.from_backbone(make_unet(**changes))


def equal(ours, theirs):
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", [None, "50KB"])
def test_whatever_diffusers_writes_is_read(branch, tmp_path, variant, safe, size):
    options = {} if size is None else {"max_shard_size": size}
    branch.save_pretrained(tmp_path, variant=variant, safe_serialization=safe, **options)
    assert (len(list(tmp_path.glob("*-of-*"))) > 1) == (size is not None)
    assert equal(BranchModel.from_pretrained(tmp_path, variant=variant), branch)
    assert equal(BranchModel.from_pretrained(tmp_path, variant=variant, use_safetensors=safe), branch)
    for other in (dict(variant="ema"), dict(use_safetensors=not safe)):
        with pytest.raises(UserError, match="holds no weights"):
            BranchModel.from_pretrained(tmp_path, **other)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_is_the_files_own_or_what_either_name_says(branch, tmp_path, name):
    branch.half().save_pretrained(tmp_path / "branch")
    for asked, dtype in ((torch.bfloat16, torch.bfloat16), ("fp32", torch.float32), ("auto", torch.float16)):
        loaded = BranchModel.from_pretrained(tmp_path, subfolder="branch", **{name: asked})
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert BranchModel.from_pretrained(tmp_path / "branch").dtype == torch.float16
    with pytest.raises(UserError, match="takes no option 'dtyp'; did you mean dtype"):
        BranchModel.from_pretrained(tmp_path / "branch", dtyp=torch.float16)


def test_a_branch_is_a_part_like_diffusers_own(branch, tmp_path):
    """Loaded as diffusers loads a pipeline's parts: by class name, with all of its options."""
    branch.train().save_pretrained(tmp_path)
    loaded = BranchModel.from_pretrained(
        tmp_path, torch_dtype=None, device_map="cpu", max_memory=None, offload_folder=None, variant=None,
        offload_state_dict=None, use_safetensors=None, low_cpu_mem_usage=True, use_flashpack=False,
        disable_mmap=False, local_files_only=True,
    )  # fmt: skip
    assert equal(loaded, branch)
    assert not loaded.training
