"""Pictures as people see them: upright, opaque and with the brightness they were made with."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from bdm.data.decoding import see
from bdm.data.pictures import PictureRules, picture_size
from bdm.data.source import UnreadableExample

RULES = PictureRules(size=32)


def saved(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(content, rules=RULES):
    return rules.decode("k", content, 32, 32).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_pictures_and_their_sizes(orientation, kind):
    values = np.kron(np.arange(24).reshape(3, 8) * 10, np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(values).convert("RGB"), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as file:
        turned = ImageOps.exif_transpose(file).convert("RGB")
        assert np.array_equal(np.asarray(see(file)), np.asarray(turned))
    assert picture_size(io.BytesIO(content)) == turned.size


def test_damaged_exif_does_not_lose_a_picture():
    content = saved(Image.new("RGB", (64, 48), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert picture_size(io.BytesIO(content)) == (64, 48)
    assert abs(pixels(content)[0, 0] - (254, 0, 0)).max() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_brightness(kind):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    found = pixels(saved(Image.fromarray(ramp), kind))
    assert abs(found.mean() - 127.5) < 1
    assert found[0, -1].min() > 250
    with pytest.raises(UnreadableExample, match="no range that is known"):
        pixels(saved(Image.fromarray(np.full((64, 64), 0.5, np.float32)), "TIFF"))


def transparent(mode):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (16, 16, 48, 48))
    if mode == "P":
        grey = Image.new("P", (64, 64), 0)
        grey.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
        grey.paste(1, (16, 16, 48, 48))
        return saved(grey, "PNG", transparency=0)
    if mode == "GIF":
        return saved(picture, "GIF")
    if mode == "tRNS":
        return saved(picture.convert("RGB"), "PNG", transparency=(0, 0, 0))
    return saved(picture.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "tRNS"])
def test_transparent_parts_show_the_background(mode):
    assert pixels(transparent(mode))[1, 1].tolist() == [255, 255, 255]
    grey = pixels(transparent(mode), PictureRules(size=32, background="#808080"))
    assert grey[1, 1].tolist() == [128, 128, 128]
    assert grey[16, 16, 0] in (255, 76)  # red, or its grey


def test_half_transparent_parts_are_mixed():
    content = saved(Image.new("RGBA", (64, 64), (0, 0, 0, 128)))
    assert abs(pixels(content)[5, 5] - 127).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_are_seen_in_their_colours(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    content = saved(Image.new("RGB", (64, 64), "white").convert(mode), kind)
    assert pixels(content).min() > 250


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(pixels(content)[9, 9] - (255, 0, 0)).max() < 8
