"""Settings that are noted beside weights and that no shape tells: acted on, or refused by name."""

import json

import pytest
import torch
from community_files import write_original
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_text_encoder, make_unet, make_vae

from bdm.errors import UserError
from bdm.formats.checkpoint import CONFIG_KEY
from bdm.method.branch import BranchModel
from bdm.models.backbone import load_backbone

#: (part, setting, a value that is not the tiny pipeline's).
OTHERS = [
    ("unet", "attention_head_dim", 8), ("unet", "attention_head_dim", [4, 4, 8, 4]),
    ("unet", "num_attention_heads", 2), ("unet", "act_fn", "gelu"), ("unet", "norm_num_groups", 4),
    ("unet", "norm_eps", 1e-6), ("unet", "flip_sin_to_cos", False), ("unet", "freq_shift", 1),
    ("unet", "resnet_time_scale_shift", "scale_shift"), ("unet", "use_linear_projection", True),
    ("unet", "mid_block_scale_factor", 1.4), ("unet", "downsample_padding", 0),
    ("unet", "resnet_out_scale_factor", 2.0), ("unet", "center_input_sample", True),
    ("unet", "only_cross_attention", True), ("unet", "timestep_post_act", "silu"),
    ("unet", "a_setting_of_next_year", "on"), ("unet", "quantization_config", {"bits": 4}),
    ("text_encoder", "hidden_act", "gelu"), ("text_encoder", "num_attention_heads", 4),
    ("text_encoder", "layer_norm_eps", 1e-6), ("text_encoder", "a_setting_of_next_year", 3),
    ("vae", "norm_num_groups", 2), ("vae", "act_fn", "relu"), ("vae", "scaling_factor", 0.13025),
    ("vae", "shift_factor", 0.1), ("vae", "latents_mean", [0.1, 0.2, 0.3, 0.4]),
    ("vae", "latents_std", [2.0, 1.0, 1.0, 1.0]), ("vae", "a_setting_of_next_year", "on"),
]  # fmt: skip
#: Settings that mean the same, or nothing to what is drawn.
SAME = [
    ("unet", "attention_head_dim", [4, 4, 4, 4]), ("unet", "act_fn", "swish"), ("unet", "sample_size", 96),
    ("unet", "upcast_attention", True), ("unet", "norm_eps", 0.00001), ("unet", "dropout", 0.1),
    ("unet", "only_cross_attention", [False] * 4), ("unet", "dual_cross_attention", None),
    ("unet", "a_setting_of_next_year", None), ("unet", "use_ema_warmup", True), ("unet", "decay", 0.9999),
    ("text_encoder", "attention_dropout", 0.1), ("text_encoder", "eos_token_id", 2),
    ("text_encoder", "top_k", 50), ("text_encoder", "torch_dtype", "float16"),
    ("vae", "shift_factor", 0.0), ("vae", "force_upcast", False), ("vae", "sample_size", 1024),
    ("vae", "act_fn", "swish"), ("vae", "latents_mean", None),
]  # fmt: skip


def write(pipe, folder, form, part, setting, value):
    """A model that notes its settings, one of them changed."""
    torch.manual_seed(9)
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()})()
    if form == "file":
        path = folder / "style.safetensors"
        tensors, metadata = write_original(other, path)
        noted = json.loads(metadata[CONFIG_KEY])
        noted[part][setting] = value
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, {CONFIG_KEY: json.dumps(noted)})
        return path
    path = folder / "style"
    for name in ("unet", "vae", "text_encoder"):
        getattr(other, name).save_pretrained(path / name)
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    edit(path / part / "config.json", setting, value)
    return path


def edit(path, setting, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))


def weights_of(pipe):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return [p.detach().clone() for part in parts for p in part.parameters()]


def unchanged(pipe, before):
    return all(torch.equal(a, b) for a, b in zip(weights_of(pipe), before, strict=True))


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(("part", "setting", "value"), OTHERS)
def test_another_setting_is_refused_by_name(pipe, tmp_path, form, part, setting, value):
    path, before = write(pipe, tmp_path, form, part, setting, value), weights_of(pipe)
    with pytest.raises(UserError, match=setting) as error:
        pipe.plugins.attach(path)
    told = str(error.value)
    assert str(value) in told
    assert str(path) in told
    assert "\n" not in told
    assert unchanged(pipe, before)
    assert len(pipe.plugins) == 0


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(("part", "setting", "value"), SAME)
def test_the_same_in_other_words_is_attached(pipe, tmp_path, form, part, setting, value):
    before = weights_of(pipe)
    pipe.plugins.attach(write(pipe, tmp_path, form, part, setting, value))
    assert not unchanged(pipe, before)
    pipe.plugins.clear()
    assert unchanged(pipe, before)


@pytest.mark.parametrize(("part", "setting", "value"), [other for other in OTHERS if other[0] == "vae"])
def test_a_vae_of_its_own_too(pipe, tmp_path, part, setting, value):
    path = write(pipe, tmp_path, "folder", part, setting, value)
    for source in (path, path / "vae"):
        with pytest.raises(UserError, match=setting):
            pipe.plugins.attach(source, kind="vae")
    assert len(pipe.plugins) == 0


def test_a_setting_that_is_left_out_is_the_class_default(pipe, tmp_path):
    path = write(pipe, tmp_path, "folder", "unet", "sample_size", 8)
    config = json.loads((path / "unet" / "config.json").read_text())
    del config["norm_num_groups"]  # 32 where nothing is said, and the tiny pipeline has 8
    (path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="norm_num_groups 32, not 8"):
        pipe.plugins.attach(path)


def test_a_part_that_the_pipeline_lacks_is_not_compared(pipe, tmp_path):
    path = write(pipe, tmp_path, "file", "text_encoder", "hidden_act", "gelu")
    pipe.text_encoder = None
    pipe.plugins.attach(path)


def test_a_backbone_is_built_with_what_is_noted(pipe, tmp_path):
    for form, value in (("file", 2), ("folder", 2)):
        path = write(pipe, tmp_path, form, "unet", "attention_head_dim", value)
        assert load_backbone(path).unet.config["attention_head_dim"] == value
    path = write(pipe, tmp_path, "folder", "text_encoder", "hidden_act", "gelu")
    assert load_backbone(path).text_encoder.config.hidden_act == "gelu"
    path = write(pipe, tmp_path, "folder", "unet", "a_setting_of_next_year", "on")
    with pytest.raises(UserError, match="a_setting_of_next_year on"):
        load_backbone(path)


@pytest.mark.parametrize("setting", ["sample_size", "upcast_attention", "dropout"])
def test_what_counts_as_harmless_changes_nothing(setting):
    values = {"sample_size": 96, "upcast_attention": True, "dropout": 0.5}
    unet = make_unet()
    settings = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    other: UNet2DConditionModel = UNet2DConditionModel(**settings | {setting: values[setting]}).eval()
    other.load_state_dict(unet.state_dict())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 7, TEXT_DIM)
    assert torch.equal(unet(*inputs).sample, other(*inputs).sample)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resnet_time_scale_shift", "scale_shift"), ("use_linear_projection", True),
        ("only_cross_attention", True), ("global_pool_conditions", True), ("class_embed_type", "timestep"),
        ("a_setting_of_next_year", "on"),
    ],
)  # fmt: skip
def test_a_branch_with_other_arithmetic_is_refused(branch, tmp_path, setting, value):
    branch.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", setting, value)
    with pytest.raises(UserError, match=f"{setting} {value}"):
        BranchModel.from_pretrained(tmp_path)


def test_a_branch_that_notes_the_usual_settings_is_loaded(branch, tmp_path):
    branch.save_pretrained(tmp_path)
    for setting, value in [
        ("conditioning_channels", 3), ("conditioning_embedding_out_channels", [16, 32, 96, 256]),
        ("resnet_time_scale_shift", "default"), ("only_cross_attention", False), ("num_class_embeds", None),
        ("upcast_attention", True), ("norm_num_groups", 4),
    ]:  # fmt: skip
        edit(tmp_path / "config.json", setting, value)
    assert BranchModel.from_pretrained(tmp_path).config["norm_num_groups"] == 4


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_branch_whose_configuration_is_damaged_is_refused(branch, tmp_path, text):
    branch.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        BranchModel.from_pretrained(tmp_path)


def test_a_controlnet_computes_with_what_it_notes(pipe, files):
    edit(files["edges"] / "config.json", "attention_head_dim", 2)
    pipe.plugins.attach(files["edges"])
    assert pipe.plugins._host.controlnets["edges"].controlnet.config["attention_head_dim"] == 2
    pipe.plugins.clear()
    edit(files["edges"] / "config.json", "a_setting_of_next_year", "on")
    with pytest.raises(UserError, match="a_setting_of_next_year on"):
        pipe.plugins.attach(files["edges"])
    assert not pipe.unet._forward_pre_hooks
