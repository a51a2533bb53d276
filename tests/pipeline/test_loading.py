"""``from_pretrained`` and ``save_pretrained`` of pipelines keep to diffusers' conventions."""

import json

import huggingface_hub
import pytest
import torch
from community_files import make_controlnet, write_original
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tiny import TEXT_DIM, make_branch, make_native, make_unet, make_vae
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from bdm.errors import UserError
from bdm.method.branch import BranchModel
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.pipeline import BridgeControlNetPipeline, BridgeImg2ImgPipeline, BridgePipeline
from bdm.text.native import NativeTextEncoder

NETWORKS = ("unet", "vae", "text_encoder", "branch", "native_text_encoder")


def draw(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    settings = dict(prompt="红灯笼", seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    return pipe(**settings | changes).images


def dtypes(pipe):
    return {name: getattr(pipe, name).dtype for name in NETWORKS}


def same_weights(ours, theirs):
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("variant", "safe", "size"),
    [(None, True, None), ("fp16", True, "100KB"), (None, False, "100KB"), ("fp16", False, None)],
)
def test_whatever_is_saved_is_loaded(pipe, tmp_path, variant, safe, size):
    sharding = {} if size is None else {"max_shard_size": size}
    pipe.save_pretrained(tmp_path, variant=variant, safe_serialization=safe, **sharding)
    loaded = BridgePipeline.from_pretrained(tmp_path, variant=variant)
    assert all(same_weights(getattr(loaded, name), getattr(pipe, name)) for name in NETWORKS)
    assert not any(getattr(loaded, name).training for name in NETWORKS)
    with pytest.raises(UserError, match="`variant=ema`.* holds none of that variant"):
        BridgePipeline.from_pretrained(tmp_path, variant="ema")


def test_parts_without_the_variant_are_loaded_without_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    other = make_branch(pipe.unet)
    other.save_pretrained(tmp_path / "branch", variant="fp16")
    loaded = BridgePipeline.from_pretrained(tmp_path, variant="fp16")
    assert same_weights(loaded.branch, other)
    assert same_weights(loaded.unet, pipe.unet)
    assert same_weights(BridgePipeline.from_pretrained(tmp_path).branch, pipe.branch)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes(pipe, tmp_path, name):
    pipe.branch.half()
    pipe.save_pretrained(tmp_path)

    def loaded(dtype):
        return dtypes(BridgePipeline.from_pretrained(tmp_path, **{name: dtype}))

    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    assert loaded(brain) == loaded("bf16") == dict.fromkeys(NETWORKS, brain)
    assert loaded(None) == dict.fromkeys(NETWORKS, single)
    assert loaded("auto") == dict.fromkeys(NETWORKS, single) | {"branch": half}
    assert loaded({"vae": brain, "default": half}) == dict.fromkeys(NETWORKS, half) | {"vae": brain}
    assert loaded({"unet": half}) == dict.fromkeys(NETWORKS, single) | {"unet": half}


def test_parts_that_are_there_are_taken_as_they_are(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    given = dict(
        unet=make_unet().half(), vae=make_vae().half(), branch=make_branch(pipe.unet).half(),
        native_text_encoder=make_native().half(), text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer,
        scheduler=DDIMScheduler(**SD15_SCHEDULE),
    )  # fmt: skip
    for name, part in given.items():
        loaded = BridgePipeline.from_pretrained(tmp_path, **{name: part})
        assert getattr(loaded, name) is part
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        folder.rename(tmp_path / f"no {folder.name}")  # nothing of the source is read then
    loaded = BridgePipeline.from_pretrained(tmp_path, **given)
    assert all(getattr(loaded, name) is part for name, part in given.items())
    assert loaded.unet.dtype == torch.float16


def test_loaded_parts_come_to_lie_on_the_device(pipe, tmp_path):
    """Those that are there already stay where they are, as in diffusers."""
    pipe.save_pretrained(tmp_path)
    loaded = BridgePipeline.from_pretrained(tmp_path, device_map="meta", unet=pipe.unet)
    devices = {name: next(getattr(loaded, name).parameters()).device.type for name in NETWORKS}
    assert devices == dict.fromkeys(NETWORKS, "meta") | {"unet": "cpu"}


def test_parts_that_are_none_are_left_out(pipe, tmp_path):
    expected, features = draw(pipe), pipe.native_text_encoder.encode(["红灯笼", ""])
    pipe.save_pretrained(tmp_path)
    loaded = BridgePipeline.from_pretrained(tmp_path, vae=None, native_text_encoder=None, text_encoder=None)
    assert loaded.vae is loaded.native_text_encoder is loaded.text_encoder is None
    texts = dict(prompt=None, prompt_embeds=features[:1], negative_prompt_embeds=features[1:])
    assert torch.equal(draw(loaded, **texts), expected), '"" is known without the text encoder'
    encoders = BridgePipeline.from_pretrained(tmp_path, unet=None, vae=None, branch=None, scheduler=None)
    assert torch.equal(encoders.native_text_encoder.encode(["红灯笼"]), features[:1])


def test_a_pipeline_without_text_encoders_comes_back_as_it_was(pipe, tmp_path):
    features = pipe.native_text_encoder.encode(["红灯笼", ""])
    pipe.save_pretrained(tmp_path / "whole")
    spared = BridgePipeline.from_pretrained(tmp_path / "whole", english=False, native_text_encoder=None)
    spared.save_pretrained(tmp_path / "spared")
    assert not (tmp_path / "spared" / "text_encoder").exists()
    again = BridgePipeline.from_pretrained(tmp_path / "spared")
    assert again.text_encoder is again.tokenizer is again.native_text_encoder is None
    texts = dict(prompt=None, prompt_embeds=features[:1], negative_prompt_embeds=features[1:])
    assert torch.equal(draw(again, **texts), draw(pipe))


def test_what_another_pipeline_left_in_the_folder_is_not_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.text_encoder = pipe.tokenizer = None
    pipe.empty_english = torch.ones(1, 77, TEXT_DIM)
    pipe.save_pretrained(tmp_path)
    loaded = BridgePipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None
    assert torch.equal(loaded.empty_english, pipe.empty_english)
    pipe.empty_english = None
    pipe.save_pretrained(tmp_path)
    assert BridgePipeline.from_pretrained(tmp_path).empty_english is None


def test_all_parts_of_diffusers_come_back(pipe, tmp_path):
    vision = dict(
        hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    parts = dict(
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)),
        feature_extractor=CLIPImageProcessor(crop_size=8, size={"shortest_edge": 8}),
        safety_checker=StableDiffusionSafetyChecker(
            CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        ),
    )
    made = BridgeControlNetPipeline(
        **{name: getattr(pipe, name) for name in (*NETWORKS, "tokenizer", "scheduler")}, **parts,
        controlnet=[make_controlnet(pipe.unet), make_controlnet(pipe.unet)], requires_safety_checker=True,
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    loaded = BridgeControlNetPipeline.from_pretrained(tmp_path, dtype={"image_encoder": torch.float16})
    assert loaded.config.requires_safety_checker
    assert loaded.image_encoder.dtype == torch.float16
    assert loaded.feature_extractor.to_dict() == made.feature_extractor.to_dict()
    for name in ("safety_checker", "controlnet"):
        assert same_weights(getattr(loaded, name), getattr(made, name))
    plain = BridgeControlNetPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert plain.safety_checker is None
    assert not plain.config.requires_safety_checker
    one = BridgeControlNetPipeline.from_pretrained(tmp_path, controlnet=tmp_path / "controlnet_1")
    assert same_weights(one.controlnet, made.controlnet.nets[1])
    assert BridgePipeline.from_pretrained(tmp_path).image_encoder is not None, (
        "what a pipeline has no use for"
    )


def test_the_index_names_our_parts(pipe, tmp_path):
    """So that whoever loads parts by their class names finds them, as diffusers does."""
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["branch"] == ["bdm.method.branch", "BranchModel"]
    assert index["native_text_encoder"] == ["bdm.text.native", "NativeTextEncoder"]
    assert index["_class_name"] == "BridgePipeline"
    # An older folder does not name the native text encoder that it holds.
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"native_text_encoder": [None, None]}))
    assert BridgePipeline.from_pretrained(tmp_path).native_text_encoder is not None
    assert pipe.config.native_text_encoder == ("bdm.text.native", "NativeTextEncoder"), (
        "saving changes nothing"
    )


def test_a_class_of_others_with_our_parts_is_loaded_by_diffusers(pipe, tmp_path):
    class Others(DiffusionPipeline):
        def __init__(self, branch: BranchModel, native_text_encoder: NativeTextEncoder) -> None:
            super().__init__()
            self.register_modules(branch=branch, native_text_encoder=native_text_encoder)

    Others(pipe.branch, pipe.native_text_encoder).save_pretrained(tmp_path)
    loaded = Others.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {loaded.branch.dtype, loaded.native_text_encoder.dtype} == {torch.float16}
    assert same_weights(loaded.branch.float(), pipe.branch.half().float())


def test_what_is_wrong_is_said_in_one_line(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for options, message in (
        (dict(guidance_scale=3), "BridgePipeline.from_pretrained takes no option 'guidance_scale'"),
        (dict(brunch=None), "did you mean branch?"),
        (dict(unet="a/b"), "unet is 'a/b'; give one that is loaded"),
        (dict(dtype={"wings": torch.float16}), "unknown part 'wings'"),
        (dict(device_map="balanced"), "enable_model_cpu_offload"),
        (dict(use_safetensors=False), "holds no weights"),
        (dict(controlnet=make_controlnet(pipe.unet)), "takes no option 'controlnet'"),
    ):
        with pytest.raises(UserError) as refused:
            BridgePipeline.from_pretrained(tmp_path, **options)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="holds no controlnet; give controlnet="):
        BridgeControlNetPipeline.from_pretrained(tmp_path)


def test_a_hub_is_told_what_diffusers_tells_it(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    asked = []

    def snapshot(name, **options):
        asked.append((name, {key: value for key, value in options.items() if value is not None}))
        return str(tmp_path / "branch" if name == "their/branch" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    BridgePipeline.from_pretrained(
        "our/model", branch="their/branch", revision="v2", local_files_only=True, token="t"
    )
    there = {"local_files_only": True, "token": "t"}
    assert asked == [("our/model", there | {"revision": "v2"}), ("their/branch", there)]


def test_a_checkpoint_file_with_a_branch(pipe, tmp_path):
    pipe.branch.save_pretrained(tmp_path / "branch")
    write_original(pipe, tmp_path / "model.safetensors")
    loaded = BridgePipeline.from_single_file(
        tmp_path / "model.safetensors", branch=tmp_path / "branch",
        native_text_encoder=pipe.native_text_encoder, scheduler=pipe.scheduler, dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(draw(loaded), draw(pipe), atol=1e-5, rtol=3e-5)
    with pytest.raises(UserError, match=r"from_single_file: a backbone holds no branch; give branch="):
        BridgePipeline.from_single_file(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no such file"):
        BridgePipeline.from_single_file(tmp_path, branch=pipe.branch)
    with pytest.raises(UserError, match="is one file, and variant="):
        BridgePipeline.from_single_file(tmp_path / "model.safetensors", branch=pipe.branch, variant="fp16")


def test_a_stock_folder_with_a_branch_and_the_way_back(pipe, tmp_path):
    stock = StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "stock")
    loaded = BridgeImg2ImgPipeline.from_pretrained(
        tmp_path / "stock", branch=pipe.branch, native_text_encoder=pipe.native_text_encoder
    )
    loaded.save_pretrained(tmp_path / "ours")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert same_weights(again.unet, pipe.unet)
    with pytest.raises(UserError, match="holds no branch; give branch="):
        BridgePipeline.from_pretrained(tmp_path / "stock")
