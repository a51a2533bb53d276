"""A bilingual pipeline is called as diffusers' own are."""

import inspect

import numpy as np
import pytest
import torch
from agreement import outputs_agree
from community_files import make_controlnet
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from bdm.errors import UserError
from bdm.pipeline import (
    BridgeControlNetPipeline,
    BridgeImg2ImgPipeline,
    BridgeInpaintPipeline,
    BridgePipeline,
)
from bdm.text.english import encode_english

STOCK = {
    BridgePipeline: StableDiffusionPipeline,
    BridgeImg2ImgPipeline: StableDiffusionImg2ImgPipeline,
    BridgeInpaintPipeline: StableDiffusionInpaintPipeline,
    BridgeControlNetPipeline: StableDiffusionControlNetPipeline,
}


def draw(pipe, prompt="红灯笼", **changes):
    pipe.set_progress_bar_config(disable=True)
    settings = dict(seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    return pipe(prompt, **settings | changes).images


@pytest.mark.parametrize("kind", STOCK)
def test_the_signature_names_all_inputs(kind):
    ours, theirs = (inspect.signature(k.__call__).parameters for k in (kind, STOCK[kind]))
    assert theirs.keys() - {"kwargs"} <= ours.keys()
    assert {"seed", "prompt_en", "branch_scale"} <= ours.keys()
    assert all(p.kind is not p.VAR_KEYWORD for p in ours.values())
    assert all(p.default is not p.empty for name, p in ours.items() if name != "self")
    assert ours["guidance_scale"].default == theirs["guidance_scale"].default


def test_a_subclass_with_a_call_of_its_own_keeps_it():
    class Own(BridgePipeline):
        def __call__(self, prompt, colour):
            return super().__call__(prompt)

    class Inherited(BridgePipeline):
        pass

    assert list(inspect.signature(Own.__call__).parameters) == ["self", "prompt", "colour"]
    assert inspect.signature(Inherited.__call__) == inspect.signature(BridgePipeline.__call__)


def test_none_stands_for_what_is_left_out(pipe):
    names = ("negative_prompt", "prompt_en", "negative_prompt_en", "clip_skip", "num_images_per_prompt")
    nothing = dict.fromkeys((*names, "height", "width", "generator", "latents", "prompt_embeds"))
    assert torch.equal(draw(pipe, **nothing), draw(pipe))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, torch.tensor])
def test_whole_numbers_of_any_kind(pipe, integer):
    changes = dict(seed=integer(3), num_images_per_prompt=integer(2))
    assert torch.equal(draw(pipe, **changes), draw(pipe, num_images_per_prompt=2))


def test_generators_as_diffusers_takes_them(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    two = ["红灯笼", "月饼"]
    alone = draw(pipe, two, seed=None, generator=generators(3)[0])
    outputs_agree(alone[:1], draw(pipe))  # one generator draws one picture's noise after the other
    each = draw(pipe, two, seed=None, generator=generators(3, 4))
    assert torch.equal(each, draw(pipe, two))
    with pytest.raises(ValueError, match="list of generators of length 3"):
        draw(pipe, two, seed=None, generator=generators(3, 4, 5))


def test_outputs_of_every_type(pipe):
    tensor = draw(pipe, output_type="pt")
    array = draw(pipe, output_type="np")
    (picture,) = draw(pipe, output_type="pil")
    outputs_agree(torch.from_numpy(array).movedim(-1, 1), tensor)
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() < 1 / 255
    whole = pipe("红灯笼", seed=3, num_inference_steps=2, guidance_scale=3.0, return_dict=False)
    assert isinstance(whole, tuple)
    assert np.array_equal(np.asarray(whole[0][0]), np.asarray(picture))


def test_latents(pipe):
    noise = torch.randn(2, 4, 8, 8)
    both = draw(pipe, seed=None, latents=noise, num_images_per_prompt=2)
    outputs_agree(both[1:], draw(pipe, seed=None, latents=noise[1:]))


def test_encode_then_draw(pipe):
    expected = draw(pipe, ["红灯笼", "月饼"], negative_prompt="坏", num_images_per_prompt=2)
    embeds, negative = pipe.encode_prompt(["红灯笼", "月饼"], "cpu", 1, True, negative_prompt="坏")
    features = dict(prompt_embeds=embeds, negative_prompt_embeds=negative)
    outputs_agree(draw(pipe, None, **features, num_images_per_prompt=2), expected)
    repeated = pipe.encode_prompt(None, "cpu", 2, True, **features)
    outputs_agree(draw(pipe, None, prompt_embeds=repeated[0], negative_prompt_embeds=repeated[1]), expected)
    again = pipe.encode_prompt(["红灯笼", "月饼"], "cpu", 2, True, negative_prompt="坏")
    assert all(map(torch.equal, again, repeated))
    assert pipe.encode_prompt("红灯笼", do_classifier_free_guidance=False)[1] is None
    with pytest.raises(UserError, match="no prompt is given"):
        pipe.encode_prompt(None)


def test_features_alone(pipe):
    embeds = pipe.native_text_encoder.encode(["红灯笼"])
    assert torch.equal(draw(pipe, None, prompt_embeds=embeds), draw(pipe))
    expected = draw(pipe, guidance_scale=1.0)
    pipe.native_text_encoder = None
    assert torch.equal(draw(pipe, None, prompt_embeds=embeds, guidance_scale=1.0), expected)
    with pytest.raises(UserError, match="no native text encoder; give prompt_embeds and negative"):
        draw(pipe, None, prompt_embeds=embeds)
    with pytest.raises(UserError, match="no native text encoder"):
        draw(pipe, None, prompt_embeds=embeds, guidance_scale=1.0, negative_prompt="坏")
    english = encode_english([""], pipe.text_encoder, pipe.tokenizer)
    pipe.text_encoder = pipe.tokenizer = None
    outputs_agree(
        draw(pipe, None, prompt_embeds=embeds, prompt_en_embeds=english, guidance_scale=1.0), expected
    )


@pytest.mark.parametrize("kind", [BridgeImg2ImgPipeline, BridgeInpaintPipeline, BridgeControlNetPipeline])
def test_pictures_of_every_type(pipe, kind):
    controlnet = {"controlnet": make_controlnet(pipe.unet)} if kind is BridgeControlNetPipeline else {}
    made = kind.from_pipe(pipe, **controlnet)
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = {} if kind is not BridgeInpaintPipeline else {"mask_image": Image.new("L", (64, 64), 255)}
    array = pixels.astype(np.float32) / 255
    forms = [
        Image.fromarray(pixels), [Image.fromarray(pixels)], array[None], [array],
        torch.from_numpy(array).movedim(-1, 0)[None],
    ]  # fmt: skip
    first, *others = (draw(made, image=form, **mask) for form in forms)
    for other in others:
        outputs_agree(other, first)


def test_callbacks(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, set(tensors)))
        tensors["latents"] = tensors["latents"] * 0
        return tensors

    names = pipe._callback_tensor_inputs
    drawn = draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == [(0, set(names)), (1, set(names))]
    assert not drawn.any()


def test_the_scale_of_a_call_reaches_the_text_encoders_adapters_too(pipe):
    before = draw(pipe, prompt_en="a lantern")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), pipe.text_encoder)
    drawn = [draw(pipe, prompt_en="a lantern", cross_attention_kwargs={"scale": s}) for s in (0.0, 1.0)]
    outputs_agree(drawn[0], before)
    assert (drawn[1] - before).abs().max() > 1e-3
    outputs_agree(draw(pipe, prompt_en="a lantern"), drawn[1])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(guidence_scale=3), "a BridgePipeline takes no 'guidence_scale'; did you mean guidance_scale?"),
        (dict(image=1), "takes no 'image'"),
        (dict(prompt=5), "prompt is 5, which is no text"),
        (dict(negative_prompt=64), "negative_prompt is 64, which is no text"),
        (dict(prompt=["龙", None]), "prompt holds None, which is no text"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt 0: give a whole number from 1 on"),
        (dict(num_images_per_prompt=1.5), "num_images_per_prompt 1.5"),
        (dict(seed=1.5), "seed 1.5"),
        (dict(seed="3"), "seed '3'"),
        (dict(clip_skip=0), "clip_skip"),
        (dict(clip_skip="2"), "clip_skip '2'"),
        (dict(branch_scale="1"), "branch_scale '1' is no number"),
        (dict(branch_scale=float("nan")), "branch_scale nan is not a finite number"),
        (dict(branch_start=None), "branch_start None is no number"),
        (dict(guidance_scale="7"), "guidance_scale '7' is no number"),
        (dict(guidance_scale=float("nan")), "guidance_scale nan is not a finite number"),
        (dict(num_inference_steps=-1), "num_inference_steps -1: give a whole number from 1 on"),
        (dict(height="64"), "height '64' is no number"),
        (dict(plugin_strength=0.5), "plugin_strength is 0.5; give strengths by the names"),
        (dict(prompt=None, prompt_embeds=[[1.0]]), "prompt_embeds is a list"),
        (dict(prompt_en_embeds=torch.zeros(3, 77, 32)), "prompt_en_embeds has shape (3, 77, 32)"),
        (dict(prompt_en_embeds=torch.zeros(1, 77, 8)), "prompt_en_embeds has shape (1, 77, 8)"),
    ],
)
def test_what_is_no_input_is_said_in_one_line(pipe, inputs, message):
    before = draw(pipe)
    with pytest.raises(UserError) as refused:
        pipe(**{"prompt": "龙", "num_inference_steps": 1} | inputs)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize("part", ["unet", "scheduler", "vae"])
def test_a_pipeline_without_a_part_says_so(pipe, part):
    setattr(pipe, part, None)
    with pytest.raises(UserError, match=f"the pipeline has no {part}, so it cannot draw; give it one"):
        pipe("龙", num_inference_steps=1)


def test_without_a_branch_the_unet_must_read_the_native_features(pipe):
    pipe.branch = None
    with pytest.raises(UserError, match="without a branch they must be equal: give .* or a branch"):
        pipe("龙", num_inference_steps=1)
    features = pipe.native_text_encoder.encode(["龙", ""])
    pipe.native_text_encoder = None
    with pytest.raises(UserError, match="the native features are .* wide and the UNet reads"):
        pipe(prompt_embeds=features[:1], negative_prompt_embeds=features[1:], num_inference_steps=1)
    with pytest.raises(UserError, match="the pipeline has no branch, so it cannot draw; give it one"):
        pipe("龙", num_inference_steps=1)
