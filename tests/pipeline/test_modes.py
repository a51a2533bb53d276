"""What pictures are drawn from: a picture, a part of one, a smaller one of its own."""

import numpy as np
import pytest
import torch
from agreement import outputs_agree
from PIL import Image

from bdm.errors import UserError
from bdm.pipeline import BridgeImg2ImgPipeline, modes
from bdm.pipeline.canvas import extend, soft_mask
from bdm.pipeline.tiling import tiled_vae

CALL = dict(prompt="红灯笼", seed=3, num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture
def picture():
    return Image.effect_noise((64, 48), 80).convert("RGB")


@pytest.fixture
def mask():
    """The right half is drawn anew."""
    array = np.zeros((48, 64), np.uint8)
    array[:, 32:] = 255
    return Image.fromarray(array)


def pixels(image):
    return np.asarray(image).astype(int)


def test_image_to_image_is_the_stock_pipelines(pipe, picture):
    made = BridgeImg2ImgPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    expected = made(**CALL, image=picture, strength=0.5).images[0]
    assert modes.image_to_image(pipe, picture, strength=0.5, **CALL).images[0] == expected
    assert modes.image_to_image(pipe, picture, width=32, height=40, **CALL).images[0].size == (32, 40)
    odd = picture.resize((61, 50))
    assert modes.image_to_image(pipe, odd, **CALL).images[0].size == (64, 48)


def test_every_prompt_may_have_a_picture_of_its_own_and_is_drawn_alike_alone(pipe, picture, mask):
    other = picture.transpose(Image.Transpose.ROTATE_180)
    prompts = CALL | dict(prompt=["红灯笼", "月饼"], output_type="pt")
    for mode, extra in ((modes.image_to_image, ()), (modes.inpaint, (mask,))):
        both = mode(pipe, [picture, other], *extra, **prompts).images
        for i, (prompt, image) in enumerate((("红灯笼", picture), ("月饼", other))):
            alone = mode(
                pipe, image, *extra, **CALL | dict(prompt=prompt, seed=3 + i, output_type="pt")
            ).images
            outputs_agree(both[i], alone[0])
    several = modes.image_to_image(pipe, [picture] * 4, **prompts, num_images_per_prompt=2).images
    assert len(several) == 4


def test_more_strength_leaves_less_of_the_picture(pipe, picture):
    call = CALL | dict(num_inference_steps=10, output_type="latent")
    base = modes.image_to_image(pipe, picture, strength=0.1, **call).images
    apart = [
        float((modes.image_to_image(pipe, picture, strength=s, **call).images - base).abs().mean())
        for s in (0.3, 1.0)
    ]
    assert 0 < apart[0] < apart[1]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_inpainting_keeps_what_the_mask_leaves_to_the_last_bit(pipe, picture, mask, kind):
    for strength in (0.5, 1.0):
        images = modes.inpaint(
            pipe, picture, mask, strength=strength, blur=2, **CALL, output_type=kind
        ).images
        image = images[0]
        if kind == "pt":
            image = (image * 255).round().movedim(0, -1).numpy()
        elif kind == "np":
            image = (image * 255).round()
        kept = np.asarray(soft_mask(mask, picture.size, 2)) == 0
        assert kept.mean() > 0.4
        assert (pixels(image)[kept] == pixels(picture)[kept]).all()
        assert (pixels(image)[:, 40:] != pixels(picture)[:, 40:]).mean() > 0.5


def test_inside_of_a_hard_mask_it_is_the_stock_pipelines(pipe, picture):
    white = Image.new("L", picture.size, 255)
    from bdm.pipeline import BridgeInpaintPipeline

    made = BridgeInpaintPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    expected = made(**CALL, image=[picture], mask_image=[white], strength=1.0, height=48, width=64).images[0]
    assert modes.inpaint(pipe, picture, white, strength=1.0, blur=0, **CALL).images[0] == expected


def test_outpainting_keeps_the_picture_and_has_the_size_that_was_asked_for(pipe, picture):
    drawn = modes.outpaint(pipe, picture, left=13, bottom=20, overlap=8, **CALL).images[0]
    assert drawn.size == (64 + 13, 48 + 20)
    inside = pixels(drawn)[: 48 - 8, 13 + 8 :]
    assert (inside == pixels(picture)[: 48 - 8, 8:]).all()
    assert modes.outpaint(pipe, picture, right=16, **CALL, output_type="np").images.shape == (1, 48, 80, 3)


def test_the_room_around_a_picture_fades_into_it():
    canvas = extend(Image.new("RGB", (32, 16), "red"), 8, 0, 0, 4, overlap=4, factor=8)
    mask = pixels(canvas.mask)
    assert canvas.size == (40, 20)
    assert canvas.picture.size == (40, 24)
    assert (mask[:, :8] == 255).all()
    assert (mask[16:] == 255).all()
    assert (mask[:12, 12:] == 0).all()
    assert (np.diff(mask[0, 7:13]) <= 0).all()
    assert 0 < mask[0, 9] < 255
    assert (pixels(canvas.picture) == [255, 0, 0]).all()


def test_hires_draws_larger_and_once_more_than_once(pipe):
    small = pipe(**CALL, output_type="pt").images
    for upscaler in ("latent", "latent nearest", "latent bicubic", "lanczos", "nearest"):
        large = modes.hires(pipe, scale=1.5, upscaler=upscaler, strength=1.0, **CALL, output_type="pt").images
        assert large.shape == (1, 3, 96, 96)
        again = modes.hires(pipe, scale=1.5, upscaler=upscaler, strength=1.0, **CALL, output_type="pt").images
        assert torch.equal(large, again)
    assert small.shape == (1, 3, 64, 64)
    sized = modes.hires(pipe, width=32, height=48, **CALL).images[0]
    assert sized.size == (64, 96)


def test_hires_of_scale_one_is_image_to_image_of_the_latents(pipe):
    generator = [torch.Generator().manual_seed(3)]
    call = {name: value for name, value in CALL.items() if name != "seed"}
    latents = pipe(**call, generator=generator, output_type="latent").images
    made = BridgeImg2ImgPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    expected = made(**call, generator=generator, image=latents, strength=0.7).images[0]
    assert modes.hires(pipe, scale=1, **CALL).images[0] == expected


def test_each_picture_of_a_hires_batch_is_drawn_alike_alone(pipe):
    call = CALL | dict(output_type="latent", scale=1.5)
    both = modes.hires(pipe, **call | dict(prompt=["红灯笼", "月饼"])).images
    outputs_agree(both[1], modes.hires(pipe, **call | dict(prompt="月饼", seed=4)).images[0])


def test_controlnets_act_in_every_mode(pipe, files, picture, mask):
    """They ask for their pictures, act with them, and see them at the size of each pass."""
    square = picture.resize((64, 64))

    def drawn(**extra):
        call = CALL | dict(output_type="latent") | extra
        return [
            modes.image_to_image(pipe, square, **call).images,
            modes.inpaint(pipe, square, mask, **call).images,
            modes.outpaint(pipe, square.resize((64, 56)), top=8, **call).images,
            modes.hires(pipe, **call).images,
        ]

    without = drawn()
    pipe.plugins.attach(files["edges"], "edges")
    with pytest.raises(UserError, match="no control picture for 'edges'"):
        drawn()
    for plain, controlled in zip(without, drawn(control_images=square), strict=True):
        assert (plain - controlled).abs().max() > 1e-4
    pipe.plugins.detach("edges")
    for plain, after in zip(without, drawn(), strict=True):
        assert torch.equal(plain, after)


def test_the_branchs_settings_act_in_every_mode(pipe, picture):
    call = CALL | dict(output_type="latent", num_inference_steps=4)
    for mode in (lambda **k: modes.image_to_image(pipe, picture, **k), lambda **k: modes.hires(pipe, **k)):
        whole = mode(**call).images
        assert torch.equal(mode(**call, branch_schedule="0:1:1").images, whole)
        assert (mode(**call, branch_schedule="0:0.5:0,0.5:1:1").images - whole).abs().max() > 1e-4


def test_tiles_are_used_for_large_pictures_alone_and_taken_back(pipe, picture, monkeypatch):
    from bdm.pipeline import tiling

    seen = []
    decode = pipe.vae.tiled_decode
    monkeypatch.setattr(pipe.vae, "tiled_decode", lambda *a, **k: seen.append(1) or decode(*a, **k))
    plain = modes.image_to_image(pipe, picture, **CALL, output_type="pt").images
    assert not seen
    tiled = modes.image_to_image(pipe, picture, tiling=True, **CALL, output_type="pt").images
    assert len(seen) == 1
    assert not pipe.vae.use_tiling
    assert tiled.shape == plain.shape
    monkeypatch.setattr(tiling, "TILED_FROM", 64 * 48)
    modes.image_to_image(pipe, picture, **CALL)
    assert len(seen) == 2
    with pytest.raises(RuntimeError), tiled_vae(pipe, 8, 8, True):
        raise RuntimeError
    assert not pipe.vae.use_tiling


def esrgan(scale=2):
    """A tiny network of ESRGAN's kind."""
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN(num_filters=8, num_blocks=1, scale=scale)


def test_an_upscalers_file_enlarges(pipe, tmp_path):
    pytest.importorskip("spandrel")
    from safetensors.torch import save_file

    from bdm.models.upscaler import Upscaler

    network = esrgan().eval()
    save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    torch.save({"params_ema": network.state_dict()}, tmp_path / "tiny.pth")
    pictures = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = network(pictures).clamp(0, 1)
    for file in ("tiny.safetensors", "tiny.pth"):
        upscaler = Upscaler(tmp_path / file)
        assert upscaler.scale == 2
        outputs_agree(upscaler(pictures), expected)
    drawn = modes.hires(pipe, scale=1.5, upscaler=str(tmp_path / "tiny.pth"), **CALL).images[0]
    assert drawn.size == (96, 96)


def test_what_is_no_upscaler_is_refused(pipe, tmp_path, files):
    pytest.importorskip("spandrel")
    for file in (files["ink"], files["mood"]):
        with pytest.raises(UserError, match="no upscaler that spandrel knows"):
            modes.hires(pipe, upscaler=str(file), **CALL)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError):
        modes.hires(pipe, upscaler=tmp_path / "bad.pth", **CALL)
    with pytest.raises(UserError, match="no such file"):
        modes.hires(pipe, upscaler="gone.pth", **CALL)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (lambda p, i, m: modes.image_to_image(p, i, strength=0, **CALL), "strength 0: give a number above 0"),
        (lambda p, i, m: modes.image_to_image(p, i, strength=1.5, **CALL), "strength 1.5"),
        (lambda p, i, m: modes.image_to_image(p, i, strength=0.4, **CALL), "leaves none to take; give 0.5"),
        (lambda p, i, m: modes.image_to_image(p, [i] * 3, **CALL), "image: 3 pictures for 1"),
        (lambda p, i, m: modes.image_to_image(p, "x.png", **CALL), "give a PIL picture"),
        (lambda p, i, m: modes.image_to_image(p, i, width=30, **CALL), "width 30 is not a positive multiple"),
        (lambda p, i, m: modes.image_to_image(p, i, **CALL, colour=1), "takes no 'colour'"),
        (lambda p, i, m: modes.inpaint(p, i, Image.new("L", (8, 8)), **CALL), "the mask is black"),
        (lambda p, i, m: modes.outpaint(p, i, **CALL), "no room is given"),
        (lambda p, i, m: modes.outpaint(p, i, left=-8, **CALL), "left is -8"),
        (lambda p, i, m: modes.hires(p, scale=0.5, **CALL), "scale 0.5: give 1 or more"),
        (lambda p, i, m: modes.hires(p, upscaler="sharp", **CALL), "known are latent"),
        (lambda p, i, m: modes.hires(p, **CALL, generator=torch.Generator()), "both seed and generator"),
    ],
)
def test_mistakes_end_in_one_message_and_change_nothing(pipe, picture, mask, mode, message):
    before = pipe(**CALL, output_type="latent").images
    with pytest.raises(UserError, match=message):
        mode(pipe, picture, mask)
    assert torch.equal(pipe(**CALL, output_type="latent").images, before)
