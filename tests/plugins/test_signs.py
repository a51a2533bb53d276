"""Signs in files and beside them that change what their weights mean: acted on or refused, never ignored."""

import json

import pytest
import torch
from agreement import outputs_agree
from community_files import make_controlnet, write_original
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from tiny import TEXT_DIM, make_text_encoder, make_unet, make_vae

from bdm.convert import convert
from bdm.errors import UserError
from bdm.formats import names
from bdm.formats.checkpoint import CONFIG_KEY
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.plugins import Plugins
from bdm.text.english import encode_english

PICTURE = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture
def control(pipe):
    """A ControlNet that its training has moved away from the backbone."""
    control = make_controlnet(pipe.unet)
    for p in control.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return control


def noted(control):
    return {CONFIG_KEY: json.dumps({"controlnet": json.loads(control.to_json_string())})}


def differences(control, unet, dtype=torch.float32, layout="original"):
    """A ControlNet as trainers of transferable ones publish it."""
    base = unet.state_dict()
    weights = {key: p - base[key] if key in base else p for key, p in control.state_dict().items()}
    if layout == "original":
        weights = {f"control_model.{k}": v for k, v in names.controlnet_to_original(weights).items()}
    return {key: weight.to(dtype).contiguous() for key, weight in weights.items()}


def attached(pipe, path, **settings):
    pipe.plugins.attach(path, "c", **settings)
    weights = pipe.plugins._host.controlnets["c"].controlnet.state_dict()
    pipe.plugins.detach("c")
    return weights


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("marker", ["difference", "control_model.difference"])
def test_the_backbone_is_added_to_differences(pipe, files, control, tmp_path, layout, dtype, marker):
    tensors = differences(control, pipe.unet, dtype, layout)
    path = tmp_path / "diff_control.safetensors"
    save_file(tensors | {marker: torch.tensor(1.0)}, path, noted(control))
    pipe.plugins.attach(files["shift"])  # the pipeline's own weights are meant, whatever is on them
    whole = attached(pipe, path)
    for key, weight in control.state_dict().items():
        torch.testing.assert_close(
            whole[key], weight, atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=1e-3
        )


def test_differences_are_added_in_the_backbones_precision(pipe, control, tmp_path):
    path = tmp_path / "diff.pth"
    torch.save(differences(control, pipe.unet) | {"difference": torch.ones(())} | noted(control), path)
    pipe.unet.half()
    pipe.plugins.attach(path, "c")
    network = pipe.plugins._host.controlnets["c"].controlnet
    assert network.dtype == torch.float16
    torch.testing.assert_close(network.conv_in.weight.float(), control.conv_in.weight, atol=1e-3, rtol=1e-2)


def test_a_checkpoint_beside_the_differences_is_not_added(pipe, control, tmp_path):
    whole, _ = write_original(pipe, tmp_path / "model.safetensors")
    path = tmp_path / "control_sd15_canny.safetensors"
    tensors = differences(control, pipe.unet) | {"difference": torch.tensor(1.0)}
    save_file(tensors | {key: t.contiguous() + 1 for key, t in whole.items()}, path, noted(control))
    torch.testing.assert_close(attached(pipe, path)["conv_in.weight"], control.conv_in.weight)


@pytest.mark.parametrize("marker", ["diff", "delta", "lora_controlnet", "differences"])
def test_what_is_not_known_beside_a_controlnet_is_refused(pipe, control, tmp_path, marker):
    path = tmp_path / "c.safetensors"
    weights = names.controlnet_to_original(control.state_dict())
    tensors = {f"control_model.{key}": weight.contiguous() for key, weight in weights.items()}
    save_file(tensors | {marker: torch.tensor(1.0)}, path, noted(control))
    with pytest.raises(UserError, match=f"holds '{marker}'"):
        pipe.plugins.attach(path)
    assert not pipe.unet._forward_pre_hooks


def test_differences_that_do_not_say_so_are_refused(pipe, control, tmp_path):
    save_file(differences(control, pipe.unet), tmp_path / "c.safetensors", noted(control))
    with pytest.raises(UserError, match="as in a file of differences"):
        pipe.plugins.attach(tmp_path / "c.safetensors")


def test_a_marker_that_says_no_is_refused(pipe, control, tmp_path):
    tensors = differences(control, pipe.unet) | {"difference": torch.tensor(0.0)}
    save_file(tensors, tmp_path / "c.safetensors", noted(control))
    with pytest.raises(UserError, match="tensor difference is 0"):
        pipe.plugins.attach(tmp_path / "c.safetensors")


def test_differences_to_another_backbone_are_refused(pipe, tmp_path):
    other = make_unet(block_out_channels=(8, 16, 32, 32))
    control = make_controlnet(other)
    tensors = differences(control, other) | {"difference": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "c.safetensors", noted(control))
    with pytest.raises(UserError, match="made for another"):
        pipe.plugins.attach(tmp_path / "c.safetensors")


def test_differences_are_not_converted_without_a_backbone(pipe, control, tmp_path):
    tensors = differences(control, pipe.unet) | {"difference": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "c.safetensors", noted(control))
    with pytest.raises(UserError, match="differences to a backbone"):
        convert(tmp_path / "c.safetensors", tmp_path / "folder", "diffusers")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("marked", [True, False])
def test_a_controlnet_without_its_picture_path_is_incomplete(pipe, control, tmp_path, marked):
    tensors = {k: v for k, v in differences(control, pipe.unet).items() if "input_hint" not in k}
    if marked:
        tensors["difference"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(UserError):
        pipe.plugins.attach(tmp_path / "c.safetensors")
    assert not pipe.unet._forward_pre_hooks


# Shuffle ControlNets


def write_shuffle(control, folder, form):
    """A ControlNet that tells by its form that its residuals are pooled."""
    tensors = {k: v.contiguous() for k, v in control.state_dict().items()}
    original = {f"control_model.{k}": v for k, v in names.controlnet_to_original(tensors).items()}
    plain = noted(control)
    control.register_to_config(global_pool_conditions=True)
    if form in ("folder", "its file"):
        control.save_pretrained(folder / "f")
        return folder / "f" / ("diffusion_pytorch_model.safetensors" if form == "its file" else "")
    path = folder / {"name": "control_v11e_sd15_Shuffle [52.5].safetensors"}.get(form, "mix.safetensors")
    save_file(original, path, noted(control) if form == "header" else plain)
    if form == "yaml":
        path.with_suffix(".yaml").write_text("model:\n  params:\n    global_average_pooling: True\n")
    return path


@pytest.mark.parametrize("form", ["folder", "its file", "name", "header", "yaml"])
def test_shuffle_controlnets_are_known_by_every_sign(pipe, control, tmp_path, form):
    path = write_shuffle(control, tmp_path, form)
    with pytest.raises(UserError, match=r"shuffle ControlNet.*pooled=True") as error:
        pipe.plugins.attach(path, "c")
    assert "\n" not in str(error.value)
    assert not pipe.unet._forward_pre_hooks
    for pooled in (True, False):
        pipe.plugins.attach(path, "c", pooled=pooled)
        network = pipe.plugins._host.controlnets["c"].controlnet
        assert network.config["global_pool_conditions"] is pooled
        pipe.plugins.detach("c")


def test_a_converted_shuffle_controlnet_says_what_it_is(control, tmp_path):
    path = write_shuffle(control, tmp_path, "name")
    convert(path, tmp_path / "folder", "diffusers")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["global_pool_conditions"] is True
    convert(tmp_path / "folder", tmp_path / "again.safetensors", "original")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(path).keys()
    with pytest.raises(UserError, match="shuffle"):
        Plugins(type("Host", (), {"unet": make_unet()})()).attach(tmp_path / "again.safetensors")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [1, 2])
def test_pooled_residuals_are_stock_diffusers(pipe, control, tmp_path, guidance, prompts):
    """Averaged over the picture, and for the positive half alone."""
    path = write_shuffle(control, tmp_path, "folder")
    parts = {key: getattr(pipe, key) for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stock = StableDiffusionPipeline(**parts, **none)
    peer = StableDiffusionControlNetPipeline(
        **parts, **none, controlnet=ControlNetModel.from_pretrained(path)
    )
    embeds = encode_english(["a cat", "a lantern", "bad"][-1 - prompts :], pipe.text_encoder, pipe.tokenizer)
    pictures = torch.rand(prompts, 3, 64, 64)
    settings = {
        "prompt_embeds": embeds[:prompts], "negative_prompt_embeds": embeds[-1:].expand(prompts, -1, -1),
        "num_inference_steps": 4, "guidance_scale": guidance, "output_type": "latent",
    }  # fmt: skip
    plugins = Plugins(stock)
    plugins.attach(path, "c", strength=0.7, pooled=True)
    with pytest.raises(UserError, match="samples="), plugins.during_call(pictures):
        stock(**settings)
    with plugins.during_call(pictures, samples=prompts):
        ours = stock(**settings, generator=torch.Generator().manual_seed(1)).images
    plugins.clear()
    theirs = peer(
        **settings, image=pictures, controlnet_conditioning_scale=0.7,
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    outputs_agree(ours, theirs)


def test_a_bilingual_pipeline_pools_beside_its_branch(pipe, control, tmp_path):
    """With a branch that is off it is the stock pipeline; with one that is on, something else."""
    path = write_shuffle(control, tmp_path, "folder")
    parts = {key: getattr(pipe, key) for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    peer = StableDiffusionControlNetPipeline(
        **parts, **none, controlnet=ControlNetModel.from_pretrained(path)
    )
    embeds = encode_english(["a cat", "bad"], pipe.text_encoder, pipe.tokenizer)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "num_images_per_prompt": 2}
    theirs = peer(
        prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], image=PICTURE, output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in (5, 6)], **settings,
    ).images  # fmt: skip
    pipe.plugins.attach(path, "c", pooled=True)
    arguments = {"prompt_en": "a cat", "negative_prompt_en": "bad", "control_images": PICTURE, "seed": 5}
    ours = pipe("龙", **arguments, **settings, output_type="latent", branch_scale=0.0).images
    outputs_agree(ours, theirs)
    bridged = pipe("龙", **arguments, **settings, output_type="latent").images
    assert (bridged - ours).abs().max() > 1e-3
    plain = pipe("龙", **arguments, **settings, output_type="latent", share=False).images
    outputs_agree(bridged, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning_channels": 1}, "1 channels"),
        ({"addition_embed_type": "text"}, "addition_embed_type text"),
    ],
)
def test_controlnets_with_other_inputs_are_refused(pipe, tmp_path, change, message):
    control = make_controlnet(pipe.unet)
    settings = {key: value for key, value in control.config.items() if not key.startswith("_")}
    ControlNetModel(**settings | change).save_pretrained(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        pipe.plugins.attach(tmp_path / "c")
    assert not pipe.unet._forward_pre_hooks


# What a checkpoint predicts


def write_style(folder, form):
    """A checkpoint that says in some form that it predicts velocity, or starts from noise alone."""
    torch.manual_seed(9)
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()})()
    path = folder / "style.safetensors"
    tensors, metadata = write_original(other, path)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    match form:
        case "v_pred" | "ztsnr":
            save_file(tensors | {form: torch.empty(0)}, path, metadata)
        case "header":
            save_file(tensors, path, metadata | {"modelspec.prediction_type": "v"})
        case "yaml":
            path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
        case "folder" | "folder with noise alone":
            scheduler = DDIMScheduler(
                **SD15_SCHEDULE | {"prediction_type": "v_prediction"}, rescale_betas_zero_snr="noise" in form
            )
            path = folder / "style"
            for name in ("unet", "vae"):
                getattr(other, name).save_pretrained(path / name)
            scheduler.save_pretrained(path / "scheduler")
            (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


def weights_of(pipe):
    return [p.detach().clone() for part in (pipe.unet, pipe.vae) for p in part.parameters()]


@pytest.mark.parametrize("form", ["v_pred", "ztsnr", "header", "yaml", "folder", "folder with noise alone"])
def test_a_checkpoint_of_another_prediction_is_refused(pipe, tmp_path, form):
    path, before = write_style(tmp_path, form), weights_of(pipe)
    with pytest.raises(UserError, match=r"prediction_type v_prediction, not epsilon|rescale_betas_zero_snr"):
        pipe.plugins.attach(path)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(pipe), before, strict=True))
    assert pipe.plugins.attach(path, kind="vae").kind == "vae"  # which predicts nothing
    pipe.plugins.clear()
    settings = SD15_SCHEDULE | {"prediction_type": "epsilon" if form == "ztsnr" else "v_prediction"}
    pipe.scheduler = DDIMScheduler(
        **settings, rescale_betas_zero_snr=form in ("ztsnr", "folder with noise alone")
    )
    pipe.plugins.attach(path)


def test_a_checkpoint_that_says_nothing_predicts_noise(pipe, tmp_path):
    path = write_style(tmp_path, "")
    pipe.plugins.attach(path)
    pipe.plugins.clear()
    pipe.scheduler = DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="prediction_type epsilon, not v_prediction"):
        pipe.plugins.attach(path)


def test_a_checkpoint_beside_an_ip_adapter(pipe, tmp_path):
    """What diffusers hangs in the UNet for it is none of the checkpoint's."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    path = write_style(tmp_path, "")
    processors = {
        name: IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=TEXT_DIM)
        if name.startswith("down_blocks.0") and name.endswith("attn2.processor")
        else processor
        for name, processor in pipe.unet.attn_processors.items()
    }
    pipe.unet.set_attn_processor(processors)
    before = weights_of(pipe)
    pipe.plugins.attach(path)
    assert not all(torch.equal(a, b) for a, b in zip(weights_of(pipe), before, strict=True))
    pipe.plugins.detach("style")
    assert all(torch.equal(a, b) for a, b in zip(weights_of(pipe), before, strict=True))


# What an adapter was trained for


def with_texts(path, folder, texts):
    save_file(load_file(path), folder / "noted.safetensors", texts)
    return folder / "noted.safetensors"


@pytest.mark.parametrize(
    "texts",
    [
        {"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"},
        {"prediction_type": "v_prediction"}, {"ss_prediction_type": "v", "ss_v_parameterization": "true"},
    ],
)  # fmt: skip
def test_an_adapter_of_another_prediction_is_refused(pipe, files, tmp_path, texts):
    path, before = with_texts(files["ink"], tmp_path, texts), weights_of(pipe)
    with pytest.raises(UserError, match=r"header says .*prediction_type v_prediction, not epsilon") as error:
        pipe.plugins.attach(path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(pipe), before, strict=True))
    assert len(pipe.plugins) == 0
    pipe.scheduler = DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": "v_prediction"})
    pipe.plugins.attach(path)


@pytest.mark.parametrize(
    "texts", [{"modelspec.prediction_type": "epsilon"}, {"ss_v_parameterization": "False"}]
)
def test_an_adapter_for_noise_is_refused_where_velocity_is_predicted(pipe, files, tmp_path, texts):
    path = with_texts(files["ink"], tmp_path, texts)
    pipe.plugins.attach(path)
    pipe.plugins.clear()
    pipe.scheduler = DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="prediction_type epsilon, not v_prediction"):
        pipe.plugins.attach(path)
    pipe.plugins.attach(files["ink"])  # which says nothing


@pytest.mark.parametrize("value", ["True", "False"])
def test_an_adapter_for_noise_alone(pipe, files, tmp_path, value):
    """Trainers note False in every file; it excludes nothing."""
    path = with_texts(files["ink"], tmp_path, {"ss_zero_terminal_snr": value})
    zero = DDIMScheduler(**SD15_SCHEDULE, rescale_betas_zero_snr=True)
    plain, pipe.scheduler = pipe.scheduler, zero
    pipe.plugins.attach(path)
    pipe.plugins.clear()
    pipe.scheduler = plain
    if value == "True":
        with pytest.raises(UserError, match="rescale_betas_zero_snr True, not False"):
            pipe.plugins.attach(path)
    else:
        pipe.plugins.attach(path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"modelspec.prediction_type": "flow"}, "'flow' is predicted"),
        ({"ss_v_parameterization": "maybe"}, "neither true nor false"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "True"}, "remove the one"),
    ],
)
def test_an_adapter_whose_signs_cannot_be_heeded_is_refused(pipe, files, tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        pipe.plugins.attach(with_texts(files["ink"], tmp_path, texts))
    assert len(pipe.plugins) == 0


@pytest.mark.parametrize(
    "texts",
    [
        {"ss_v2": "True"}, {"ss_base_model_version": "sd_v2_v"}, {"ss_base_model_version": "sdxl_base_v1-0"},
        {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, {"ss_v2": "perhaps"},
    ],
)  # fmt: skip
def test_an_adapter_for_another_family_is_refused_though_its_shapes_fit(pipe, files, tmp_path, texts):
    with pytest.raises(UserError, match=next(iter(texts))):
        pipe.plugins.attach(with_texts(files["ink"], tmp_path, texts))
    assert len(pipe.plugins) == 0


def test_an_adapter_noted_for_this_family_is_attached(pipe, files, tmp_path):
    texts = {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.prediction_type": "epsilon",
        "modelspec.architecture": "stable-diffusion-v1/lora", "ss_zero_terminal_snr": "False",
        "ss_v_parameterization": "None", "ss_sd_model_name": "sdxl.safetensors",
    }  # fmt: skip
    pipe.plugins.attach(with_texts(files["ink"], tmp_path, texts))
