import pytest
import torch
from agreement import outputs_agree
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from PIL import Image
from tiny import NATIVE_DIM, make_branch, make_native_model, make_unet, make_vae

from bdm import Bridge, NativeCondition
from bdm.errors import UserError
from bdm.extras import is_installed
from bdm.method.branch import BranchModel
from bdm.models.samplers import SAMPLERS, make_scheduler
from bdm.pipeline import (
    BridgeControlNetPipeline,
    BridgeImg2ImgPipeline,
    BridgeInpaintPipeline,
    BridgePipeline,
)
from bdm.text.english import encode_english
from bdm.text.native import NativeTextEncoder

STEPS = dict(num_inference_steps=3, output_type="latent")


def latents_of(pipe, *arguments, **options):
    return pipe(*arguments, **STEPS | options).images


@torch.no_grad()
def official_loop(
    pipe, prompt, negative, english, negative_english, latents, steps, guidance, scale, start, end
):
    """The official denoising loop, written out: doubled batch [negative, positive] through both networks."""
    native = pipe.native_text_encoder.encode([prompt, negative]).flip(0)
    text = encode_english([negative_english, english], pipe.text_encoder, pipe.tokenizer)
    pipe.scheduler.set_timesteps(steps)
    latents = latents * pipe.scheduler.init_noise_sigma
    for i, t in enumerate(pipe.scheduler.timesteps):
        keep = 0.0 if i / steps < start or (i + 1) / steps > end else 1.0
        x = torch.cat([latents] * 2)
        x = pipe.scheduler.scale_model_input(x, t)
        down, middle = pipe.branch(x, t, native, scale * keep, return_dict=False)
        eps = pipe.unet(
            x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        negative_eps, positive_eps = eps.chunk(2)
        latents = pipe.scheduler.step(
            negative_eps + guidance * (positive_eps - negative_eps), t, latents
        ).prev_sample
    return latents


@pytest.mark.parametrize("sampler", ["DDIM", "DPM++ 2M"])
def test_equals_the_official_loop_written_out(pipe, sampler):
    pipe.scheduler = make_scheduler(sampler)
    latents = torch.randn(1, 4, 8, 8)
    arguments = ("红灯笼", "模糊", "best quality", "blurry")
    expected = official_loop(
        pipe, *arguments, latents, steps=10, guidance=7.5, scale=0.8, start=0.2, end=0.85
    )
    ours = latents_of(
        pipe,
        arguments[0],
        arguments[1],
        prompt_en=arguments[2],
        negative_prompt_en=arguments[3],
        latents=latents,
        num_inference_steps=10,
        guidance_scale=7.5,
        branch_scale=0.8,
        branch_start=0.2,
        branch_end=0.85,
    )
    outputs_agree(ours, expected)


def test_picture_i_of_a_batch_can_be_made_again_alone(pipe):
    batch = latents_of(pipe, ["红灯笼", "月饼"], seed=7, num_images_per_prompt=2)
    assert batch.shape == (4, 4, 8, 8)
    for i, prompt in enumerate(["红灯笼", "红灯笼", "月饼", "月饼"]):
        torch.testing.assert_close(batch[i], latents_of(pipe, prompt, seed=7 + i)[0], atol=1e-4, rtol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 1e-2


def test_without_guidance_one_positive_pass(pipe):
    batches = []
    pipe.branch.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents_of(pipe, "红灯笼", seed=0, guidance_scale=1.0)
    assert batches == [1, 1, 1]


def test_four_embeddings_replace_the_four_texts_and_both_encoders(pipe):
    native = pipe.native_text_encoder.encode(["红灯笼", "模糊"])
    english = encode_english(["best", "worst"], pipe.text_encoder, pipe.tokenizer)
    expected = latents_of(pipe, "红灯笼", "模糊", prompt_en="best", negative_prompt_en="worst", seed=3)
    bare = BridgePipeline(pipe.vae, None, None, pipe.unet, pipe.scheduler, pipe.branch, None)
    ours = latents_of(
        bare, prompt_embeds=native[:1], negative_prompt_embeds=native[1:], prompt_en_embeds=english[:1],
        negative_prompt_en_embeds=english[1:], seed=3,
    )  # fmt: skip
    outputs_agree(ours, expected)
    with pytest.raises(UserError, match="no native text encoder"):
        bare("红灯笼")
    with pytest.raises(UserError, match="no English text encoder"):
        bare(prompt_embeds=native[:1], negative_prompt_embeds=native[1:])


def test_saves_and_loads_a_standard_folder(pipe, tmp_path):
    expected = latents_of(pipe, "红灯笼", seed=3)
    pipe.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "branch",
    }
    outputs_agree(latents_of(BridgePipeline.from_pretrained(tmp_path), "红灯笼", seed=3), expected)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(stock.unet).__name__ == "UNet2DConditionModel"
    (tmp_path / "branch" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        BridgePipeline.from_pretrained(tmp_path)


def stock(kind, pipe, **parts):
    made = kind(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=parts.pop("unet", pipe.unet),
        scheduler=pipe.scheduler,
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", ["text2img", "img2img", "inpaint", "controlnet", "pag", "animatediff"])
def test_any_stock_pipeline_becomes_bilingual_and_back(pipe, name):
    from diffusers import AnimateDiffPipeline

    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    plain = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    english = dict(
        prompt_embeds=encode_english(["best"], pipe.text_encoder, pipe.tokenizer),
        negative_prompt_embeds=encode_english([""], pipe.text_encoder, pipe.tokenizer),
    )
    match name:
        case "text2img":
            made, options = stock(StableDiffusionPipeline, pipe, **plain), {}
        case "img2img":
            made, options = (
                stock(StableDiffusionImg2ImgPipeline, pipe, **plain),
                dict(image=picture, strength=0.9),
            )
        case "inpaint":
            mask = Image.new("L", (64, 64), 255)
            made = stock(StableDiffusionInpaintPipeline, pipe, **plain)
            options = dict(image=picture, mask_image=mask, strength=1.0, height=64, width=64)
        case "controlnet":
            made = stock(
                StableDiffusionControlNetPipeline,
                pipe,
                controlnet=ControlNetModel.from_unet(pipe.unet),
                **plain,
            )
            options = dict(image=picture)
        case "pag":
            made, options = stock(StableDiffusionPAGPipeline, pipe, **plain), dict(pag_scale=2.0)
        case "animatediff":
            adapter = MotionAdapter(
                block_out_channels=(16, 16, 32, 32),
                motion_num_attention_heads=2,
                motion_norm_num_groups=8,
                motion_max_seq_length=4,
            )
            motion = UNetMotionModel.from_unet2d(pipe.unet, adapter)
            made, options = (
                stock(AnimateDiffPipeline, pipe, unet=motion, motion_adapter=adapter),
                dict(num_frames=2),
            )

    def run():
        output = made(
            **english,
            **options,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="latent",
        )
        return output.frames if name == "animatediff" else output.images

    before = run()
    native = pipe.native_text_encoder.encode(["红灯笼", ""])
    bridge = Bridge(pipe.branch).attach(made.unet)
    with bridge.condition(NativeCondition(native[:1], native[1:])):
        acting = run()
    bridge.detach()
    assert (acting - before).abs().max() > 1e-3
    assert torch.equal(run(), before)
    fresh = Bridge(BranchModel.from_backbone(pipe.unet, NATIVE_DIM), share=False).attach(made.unet)
    with fresh.condition(NativeCondition(native[:1], native[1:])):
        assert torch.equal(run(), before), "zero residuals change nothing"


def test_variants_share_the_call(pipe):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    parts = pipe.components
    parts = {
        k: parts[k]
        for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "branch", "native_text_encoder")
    }
    variants = [
        (BridgeImg2ImgPipeline(**parts), dict(image=picture, strength=0.7)),
        (
            BridgeInpaintPipeline(**parts),
            dict(image=picture, mask_image=Image.new("L", (64, 64), 255), strength=1.0),
        ),
        (
            BridgeControlNetPipeline(**parts, controlnet=ControlNetModel.from_unet(pipe.unet)),
            dict(image=picture),
        ),
    ]
    for made, options in variants:
        made.set_progress_bar_config(disable=True)
        first = latents_of(made, "红灯笼", seed=1, **options)
        assert torch.equal(first, latents_of(made, "红灯笼", seed=1, **options))
        assert (first - latents_of(made, "月饼", seed=1, **options)).abs().max() > 1e-3


def test_step_callback_and_generator(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    ours = latents_of(
        pipe, "红灯笼", generator=torch.Generator().manual_seed(4), callback_on_step_end=callback
    )
    assert seen == [0, 1, 2]
    assert torch.equal(ours, latents_of(pipe, "红灯笼", seed=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "no prompt is given"),
        (dict(prompt=[]), "no prompt is given"),
        (dict(prompt="龙", height=30), "height 30 is not a positive multiple of 8; use 32"),
        (dict(prompt="龙", seed=1, generator=torch.Generator()), "both seed and generator"),
        (dict(prompt="龙", branch_start=0.7, branch_end=0.2), "branch window 0.7 to 0.2"),
        (dict(prompt=["龙", "虎"], prompt_en=["a"]), "prompt_en has 1 texts for 2 prompts"),
        (
            dict(prompt_embeds=torch.zeros(1, 52, 5), negative_prompt_embeds=torch.zeros(1, 52, 5)),
            r"shape \(1, 52, 5\)",
        ),
    ],
)
def test_bad_calls_end_in_one_message_and_leave_no_hook(pipe, options, message):
    before = latents_of(pipe, "龙", seed=0)
    with pytest.raises(UserError, match=message):
        pipe(**options)
    assert torch.equal(latents_of(pipe, "龙", seed=0), before)


def test_parts_that_do_not_fit_are_refused(pipe, native):
    other = NativeTextEncoder(make_native_model(hidden_size=64), native.tokenizer)
    with pytest.raises(UserError, match="features are 64 wide and the branch reads 48"):
        BridgePipeline(pipe.vae, None, None, pipe.unet, pipe.scheduler, pipe.branch, other)
    unet = make_unet(block_out_channels=(16, 16, 16, 16))
    with pytest.raises(UserError, match="block_out_channels"):
        BridgePipeline(make_vae(), None, None, unet, pipe.scheduler, make_branch(pipe.unet), native)


def test_samplers_by_every_spelling():
    for title, said in SAMPLERS.items():
        if title == "LMS" and not is_installed("scipy"):  # its absence is tested with the other extras
            continue
        assert type(make_scheduler(title)).__name__ == said.kind
        assert type(make_scheduler(said.short.upper())).__name__ == said.kind
    karras = [make_scheduler(n) for n in ("DPM++ 2M Karras", "dpmpp_2m_karras", "dpm++ 2m KARRAS")]
    assert all(s.config.use_karras_sigmas for s in karras)
    official = make_scheduler("DPM++ 2M")
    assert isinstance(official, DPMSolverMultistepScheduler)
    assert official.config.timestep_spacing == "linspace"
    assert official.config.final_sigmas_type == "sigma_min"
    with pytest.raises(UserError, match="unknown sampler 'Eular'; known are DPM"):
        make_scheduler("Eular")
    with pytest.raises(UserError, match="DDIM has no karras"):
        make_scheduler("DDIM Karras")


def test_one_side_alone_is_heeded(pipe):
    assert pipe("龙", height=32, num_inference_steps=1).images[0].size == (64, 32)
    assert pipe("龙", width=96, num_inference_steps=1).images[0].size == (96, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_english_text_encoder_the_empty_prompt_is_the_same(
    pipe, tmp_path, monkeypatch, own_cache, dtype
):
    """What "" says is worked out at the first load; from then on the text encoder is not even built."""
    from bdm.models import backbone

    pipe.save_pretrained(tmp_path / "model")

    def drawn(**options):
        loaded = BridgePipeline.from_pretrained(tmp_path / "model", torch_dtype=dtype, **options)
        loaded.set_progress_bar_config(disable=True)
        return (
            loaded,
            loaded(
                ["龙", "月饼"], seed=1, num_inference_steps=2, guidance_scale=3.0, output_type="pt"
            ).images,
        )

    _, whole = drawn()
    before = set(own_cache.iterdir())
    _, first = drawn(english=False)
    built = []
    real = backbone.build_part
    monkeypatch.setattr(backbone, "build_part", lambda name, *rest: built.append(name) or real(name, *rest))
    spared, second = drawn(english=False)
    outputs_agree(first, whole)
    outputs_agree(second, whole)
    assert "text_encoder" not in built
    assert spared.text_encoder is None
    (kept,) = set(own_cache.iterdir()) - before
    with pytest.raises(UserError, match="english=True"):
        spared("龙", prompt_en="a cat", num_inference_steps=1)
    with pytest.raises(UserError, match="english=True"):
        spared("龙", clip_skip=2, num_inference_steps=1)
    # Another text encoder in the folder is another cache; a damaged cache is worked out again.
    kept.write_bytes(b"damaged")
    outputs_agree(drawn(english=False)[1], whole)
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.weight.mul_(2)
    pipe.text_encoder.save_pretrained(tmp_path / "model/text_encoder")
    outputs_agree(drawn(english=False)[1], drawn()[1])
    assert (drawn()[1] - whole).abs().max() > 0.01
