"""A picture as a prompt of the backbone's."""

import pytest
import torch
from community_files import ip_adapter_tensors, make_image_encoder
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from bdm.errors import UserError
from bdm.pipeline import modes
from bdm.pipeline.ip_adapter import ip_adapter

CALL = dict(prompt="红灯笼", seed=3, num_inference_steps=2, guidance_scale=3.0, output_type="latent")


@pytest.fixture
def picture():
    return Image.effect_noise((64, 64), 80).convert("RGB")


@pytest.fixture
def encoder():
    return make_image_encoder()


@pytest.fixture
def tensors(pipe):
    return ip_adapter_tensors(pipe.unet)


@pytest.fixture
def file(tensors, tmp_path):
    save_file(tensors, tmp_path / "ip-adapter_tiny.safetensors")
    return tmp_path / "ip-adapter_tiny.safetensors"


def test_it_acts_on_the_backbone_alone_and_leaves_nothing_behind(pipe, file, encoder, picture):
    pipe.register_modules(feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    seen = []
    pipe.branch.register_forward_pre_hook(lambda _, args: seen.append(args))
    before = pipe(**CALL).images
    steps = len(seen)
    with ip_adapter(pipe, file, scale=0.8, image_encoder=encoder):
        acting = pipe(**CALL, ip_adapter_image=picture).images
        other = pipe(**CALL, ip_adapter_image=picture.transpose(Image.Transpose.ROTATE_180)).images
    assert (acting - before).abs().max() > 1e-3
    assert (acting - other).abs().max() > 1e-5
    # The branch's first call sees latents, time and text as without it, whatever the sharing.
    for plain, told in zip(seen[0], seen[steps], strict=True):
        if isinstance(plain, torch.Tensor) and plain.ndim:
            plain, told = plain[-1], told[-1]
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(told))
    assert torch.equal(pipe(**CALL).images, before)
    assert pipe.image_encoder is None


def test_strength_zero_is_without_effect(pipe, file):
    embeds = [torch.randn(2, 1, 32)]
    before = pipe(**CALL).images
    with ip_adapter(pipe, file, scale=0.0):
        without = pipe(**CALL, ip_adapter_image_embeds=embeds).images
    torch.testing.assert_close(without, before, atol=1e-5, rtol=3e-5)


def test_it_acts_in_every_mode(pipe, file, picture):
    embeds = [torch.randn(2, 1, 32)]
    mask = Image.new("L", (64, 64), 255)

    def drawn(**extra):
        call = CALL | extra
        yield modes.image_to_image(pipe, picture, **call).images
        yield modes.inpaint(pipe, picture, mask, **call).images
        yield modes.hires(pipe, **call).images

    before = list(drawn())
    with ip_adapter(pipe, file):
        acting = list(drawn(ip_adapter_image_embeds=embeds))
    for plain, told in zip(before, acting, strict=True):
        assert (plain - told).abs().max() > 1e-4


@pytest.mark.parametrize("change", ["other", "part", "wide", "gone"])
def test_other_files_are_refused_and_change_nothing(pipe, tensors, tmp_path, change):
    file = tmp_path / "bad.safetensors"
    if change == "other":
        tensors["lora.down"] = torch.zeros(2)
    elif change == "part":
        tensors = {name: value for name, value in tensors.items() if name.startswith("ip")}
    elif change == "wide":
        tensors = {name: value[:1] if value.ndim == 2 else value for name, value in tensors.items()}
    if change != "gone":
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    before = pipe(**CALL).images
    with pytest.raises(UserError), ip_adapter(pipe, file):
        pass
    assert torch.equal(pipe(**CALL).images, before)


def test_two_at_once_are_refused(pipe, file):
    with ip_adapter(pipe, file), pytest.raises(UserError, match="already"), ip_adapter(pipe, file):
        pass
