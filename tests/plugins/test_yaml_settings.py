"""What a yaml of the original program beside a single file says of its networks."""

import json

import pytest
import torch
import yaml
from community_files import make_controlnet, write_original
from safetensors.torch import save_file
from tiny import make_text_encoder, make_unet, make_vae

from bdm.errors import UserError
from bdm.formats import names
from bdm.formats.checkpoint import CONFIG_KEY, read_parts
from bdm.formats.identify import describe_file
from bdm.formats.yaml_settings import yaml_configs
from bdm.models.backbone import load_backbone

#: As beside the published SD1.5 (its v1-inference.yaml), for the tiny networks' sizes.
STOCK = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    scheduler_config: {target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [10000]}}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 16
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 1, 2, 2]
        num_heads: 4
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 32
        use_checkpoint: True
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 8
          ch_mult: [1, 1, 2, 2]
          num_res_blocks: 1
          attn_resolutions: []
          dropout: 0.0
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


def stock(place="", **changes):
    """The stock yaml with something changed at a place such as "unet_config.params"."""
    content = yaml.safe_load(STOCK)
    inner = content["model"]["params"]
    for name in filter(None, place.split(".")):
        inner = inner.setdefault(name, {})
    inner.update(changes)
    return yaml.safe_dump(content)


@pytest.fixture
def style(tmp_path):
    """A checkpoint whose header only says what the original program cannot: how many groups and heads."""
    torch.manual_seed(9)
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()})()
    path = tmp_path / "style.safetensors"
    tensors, _ = write_original(other, path)
    noted = {
        "unet": {"norm_num_groups": 8},
        "vae": {"norm_num_groups": 4},
        "text_encoder": {"num_attention_heads": 2},
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {CONFIG_KEY: json.dumps(noted)})
    return path


def test_the_stock_yaml_says_what_sd15_is(style, pipe):
    style.with_suffix(".yaml").write_text(STOCK)
    assert yaml_configs(style)["unet"] == {
        "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "attention_head_dim": 4,
        "transformer_layers_per_block": 1, "cross_attention_dim": 32, "block_out_channels": [16, 16, 32, 32],
    }  # fmt: skip
    assert yaml_configs(style)["vae"] == {
        "latent_channels": 4, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": [8, 8, 16, 16],
    }  # fmt: skip
    pipe.plugins.attach(style)
    assert load_backbone(style).unet.config["attention_head_dim"] == 4


CHANGES = [
    ("unet_config.params", {"num_heads": 8}, "attention_head_dim 8, not 4"),
    ("unet_config.params", {"num_heads": -1, "num_head_channels": 8}, "attention_head_dim"),
    ("unet_config.params", {"use_linear_in_transformer": True}, "use_linear_projection True, not False"),
    ("unet_config.params", {"use_scale_shift_norm": True}, "resnet_time_scale_shift scale_shift"),
    ("unet_config.params", {"resblock_updown": True}, "resblock_updown True"),
    ("unet_config.params", {"dims": 3}, "dims 3"),
    ("unet_config.params", {"channel_mult": "wide"}, "channel_mult wide|model_channels 16"),
    ("unet_config", {"target": "sgm.modules.VideoUNet"}, "unet is a VideoUNet"),
    ("unet_config", {"params": [1]}, "no named params"),
    ("first_stage_config.params.ddconfig", {"tanh_out": True}, "tanh_out True"),
    ("first_stage_config.params.ddconfig", {"double_z": False}, "double_z False"),
    ("cond_stage_config.params", {"layer": "hidden", "layer_idx": -2}, "layer hidden"),
    ("cond_stage_config", {"target": "x.FrozenOpenCLIPEmbedder"}, "text encoder is a FrozenOpenCLIPEmbedder"),
    ("", {"conditioning_key": "hybrid"}, "conditioning_key hybrid"),
    ("", {"given_betas": [0.1]}, "given_betas"),
    ("", {"a_setting_of_next_year": "on"}, "a_setting_of_next_year on"),
    ("", {"unet_config": "none"}, "describes no unet_config"),
]


@pytest.mark.parametrize(("place", "change", "message"), CHANGES)
def test_another_setting_is_refused_by_name(style, pipe, place, change, message):
    style.with_suffix(".yaml").write_text(stock(place, **change))
    before = [p.clone() for p in pipe.unet.parameters()]
    with pytest.raises(UserError, match=message) as error:
        pipe.plugins.attach(style)
    assert "\n" not in str(error.value)
    if "not known" in str(error.value) and not place:  # which no network need be built for
        assert describe_file(style)["problem"] == str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), before, strict=True))


def test_a_backbone_is_built_with_what_its_yaml_says(style):
    style.with_suffix(".yaml").write_text(stock("unet_config.params", num_heads=-1, num_head_channels=8))
    assert load_backbone(style).unet.config["attention_head_dim"] == [2, 2, 4, 4]


def test_a_yaml_and_a_header_that_contradict_each_other_are_refused(style):
    parts = {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()}
    write_original(type("Other", (), parts)(), style)
    style.with_suffix(".yaml").write_text(stock("unet_config.params", num_heads=8))
    with pytest.raises(UserError, match="own header says attention_head_dim 4, and the yaml beside it 8"):
        read_parts(style)


def test_a_vae_with_a_yaml_of_its_own(pipe, files):
    described = yaml.safe_load(STOCK)["model"]["params"]["first_stage_config"]
    described["params"]["ddconfig"]["tanh_out"] = True
    files["colours"].with_suffix(".yaml").write_text(yaml.safe_dump({"model": described}))
    with pytest.raises(UserError, match="tanh_out"):
        pipe.plugins.attach(files["colours"])


def test_a_controlnet_is_built_with_what_its_yaml_says(pipe, tmp_path):
    tensors = names.controlnet_to_original(make_controlnet(pipe.unet).state_dict())
    path = tmp_path / "canny.safetensors"
    noted = {CONFIG_KEY: json.dumps({"controlnet": {"norm_num_groups": 8}})}
    save_file({f"control_model.{k}": t.contiguous() for k, t in tensors.items()}, path, noted)
    described = yaml.safe_load(STOCK)["model"]["params"]["unet_config"]["params"]
    described = {k: v for k, v in described.items() if k != "out_channels"} | {"hint_channels": 3}
    config = {"target": "cldm.cldm.ControlNet", "params": described | {"num_heads": 2}}
    path.with_suffix(".yaml").write_text(stock("", control_stage_config=config, control_key="hint"))
    pipe.plugins.attach(path)
    network = pipe.plugins._host.controlnets["canny"].controlnet
    assert network.config["attention_head_dim"] == 2
