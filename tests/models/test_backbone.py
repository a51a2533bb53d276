"""``load_backbone`` keeps to diffusers' options; see also tests/formats, where all layouts are read."""

import pytest
import torch
from community_files import write_original
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import make_unet, make_vae

from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.models.noise_schedule import SD15_SCHEDULE

HALF, SINGLE = torch.float16, torch.float32


@pytest.fixture
def folder(pipe, tmp_path):
    stock = StableDiffusionPipeline(
        pipe.vae.half(), pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def dtypes(backbone):
    return [backbone.unet.dtype, backbone.vae.dtype, backbone.text_encoder.dtype]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [SINGLE] * 3),
        (dict(dtype=HALF), [HALF] * 3),
        (dict(torch_dtype="fp16"), [HALF] * 3),
        (dict(dtype=HALF, torch_dtype=HALF), [HALF] * 3),
        (dict(dtype=None), [SINGLE, HALF, SINGLE]),
        (dict(dtype="auto"), [SINGLE, HALF, SINGLE]),
        (dict(dtype={"unet": HALF}), [HALF, SINGLE, SINGLE]),
        (dict(torch_dtype={"unet": HALF, "default": torch.bfloat16}), [HALF] + [torch.bfloat16] * 2),
    ],
)
def test_dtypes(folder, options, expected):
    assert dtypes(load_backbone(folder, **options)) == expected


def test_parts_that_are_there_are_taken_and_none_is_left_out(folder, pipe):
    given = dict(unet=make_unet(), vae=make_vae(), scheduler=DDIMScheduler(**SD15_SCHEDULE))
    given |= dict(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    for name, part in given.items():
        assert getattr(load_backbone(folder, **{name: part}), name) is part
    assert load_backbone(folder, unet=None).unet is None
    spared = load_backbone(folder, text_encoder=False)
    assert spared.text_encoder is spared.tokenizer is None
    for part in folder.iterdir():
        if part.is_dir():
            part.rename(folder / f"no {part.name}")
    backbone = load_backbone(folder, **given)
    assert all(getattr(backbone, name) is part for name, part in given.items())


def test_parts_come_to_lie_on_the_device(folder):
    given = make_unet()
    backbone = load_backbone(folder, device_map="meta", unet=given)
    assert backbone.vae.device.type == backbone.text_encoder.device.type == "meta"
    assert given.device.type == "cpu"


def test_variants_and_kinds_of_files(folder, pipe, tmp_path):
    other = make_unet()
    other.save_pretrained(folder / "unet", variant="ema")
    weight = load_backbone(folder, variant="ema").unet.conv_in.weight
    assert torch.equal(weight, other.conv_in.weight)
    assert torch.equal(load_backbone(folder).unet.conv_in.weight, pipe.unet.conv_in.weight)
    write_original(pipe, tmp_path / "model.safetensors")
    for source, options, message in (
        (folder, dict(variant="fp16"), "holds none of that variant"),
        (folder, dict(use_safetensors=False), "holds no weights"),
        (tmp_path / "model.safetensors", dict(variant="fp16"), "is one file, and variant='fp16' names"),
        (tmp_path / "model.safetensors", dict(use_safetensors=False), "is a safetensors file and"),
        (folder, dict(wings=None), "load_backbone takes no option 'wings'"),
        (folder, dict(dtype=HALF, torch_dtype=SINGLE), "give one of them"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(source, **options)
    assert load_backbone(tmp_path / "model.safetensors", use_safetensors=True).unet is not None
