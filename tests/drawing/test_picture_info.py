"""What is written into a picture: no text of any length or kind loses the picture."""

import json

import pytest
from PIL import Image

from bdm.drawing.grid import save_picture
from bdm.drawing.picture_info import describe, picture_info


class Plugin:
    """What the facts ask of one."""

    def __init__(self, name):
        self.name, self.kind, self.hash, self.strength = name, "adapter", "0" * 12, {}
        self.source = type("Path", (), {"name": f"{name}.safetensors"})


def facts(**changes):
    said = {"prompt": "龙", "negative": "", "prompt_en": "", "negative_en": "", "seed": 7, "steps": 1,
            "guidance": 2.0, "sampler": "DDIM", "branch_scale": 1.0, "size": (32, 32),
            "model": "emoji"}  # fmt: skip
    return describe(**said | changes)


def comment(path):
    with Image.open(path) as picture:
        content = picture.getexif().get_ifd(0x8769).get(0x9286)
    return None if content is None else content.removeprefix(b"UNICODE\0").decode("utf-16-be")


LONG = {
    "prompt": {"prompt": "红灯笼，" * 9000},
    "negative": {"negative": "bad " * 9000},
    "both": {"prompt": "红灯笼，" * 9000, "negative": "模糊，" * 12000},
    "emoji": {"prompt": "👩‍🔬" * 20000, "negative": "🐉" * 50000},
    "a long and a short one": {"prompt": "龙，" * 20000, "negative": "模糊"},
    "a million": {"prompt": "x" * 10**6},
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("ending", [".png", ".webp", ".jpg", ".jpeg", ".JPG"])
def test_long_prompts_are_cut_where_the_file_has_no_room(tmp_path, name, ending):
    path = tmp_path / f"a{ending}"
    said = facts(**LONG[name])
    save_picture(Image.new("RGB", (32, 32)), path, **picture_info(said, ending))
    if ending == ".png":
        with Image.open(path) as picture:
            assert json.loads(picture.text["bdm"]) == said
        return
    text = comment(path)
    prompt, *_, settings = text.split("\n")
    assert settings.startswith("Steps: 1, Sampler: DDIM, CFG scale: 2.0, Seed: 7, Size: 32x32, Model: emoji")
    if ending == ".webp":
        assert prompt == said["prompt"]
        return
    assert 60_000 < len(text.encode("utf-16-be")) < 65_533, "as much as there is room for"
    assert said["prompt"].startswith(prompt.removesuffix("…"))
    if said["negative_prompt"]:
        (negative,) = [line for line in text.split("\n") if line.startswith("Negative prompt: ")]
        assert said["negative_prompt"].startswith(
            negative.removeprefix("Negative prompt: ").removesuffix("…")
        )
    if name == "a long and a short one":
        assert "\nNegative prompt: 模糊\n" in text
    text.encode("utf-8")  # no character was cut in two


def test_settings_that_are_too_long_are_left_out(tmp_path):
    plugins = [Plugin("x" * 200 + str(i)) for i in range(300)]
    save_picture(
        Image.new("RGB", (32, 32)), tmp_path / "a.jpg", **picture_info(facts(plugins=plugins), ".jpg")
    )
    assert comment(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("ending", [".png", ".webp", ".jpg"])
def test_texts_that_no_encoding_takes_do_not_lose_the_picture(tmp_path, ending):
    """A model's folder or a file whose name is no UTF-8."""
    said = facts(prompt="龙\ud83d", model="/models/\udcff", plugins=[Plugin("\udc80ink")])
    save_picture(Image.new("RGB", (32, 32)), tmp_path / f"a{ending}", **picture_info(said, ending))
    if ending == ".png":
        with Image.open(tmp_path / "a.png") as picture:
            text = picture.text["parameters"]
            assert json.loads(picture.text["bdm"])["model"] == "/models/�"
    else:
        text = comment(tmp_path / f"a{ending}")
    assert text.startswith("龙�\nSteps: 1")
    assert "Model: /models/�" in text


def test_names_write_no_lines_of_their_own():
    plugin = Plugin("ink\nSteps: 99, Seed: 1")
    text = picture_info(facts(plugins=[plugin], model="a\nSteps: 98"), ".png")["pnginfo"]
    (parameters,) = [chunk for chunk in text.chunks if b"parameters" in chunk[1]]
    assert parameters[1].decode().count("\n") == 1


@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_the_comment_is_of_the_type_that_the_standard_says(tmp_path, ending):
    save_picture(Image.new("RGB", (8, 8)), tmp_path / f"a{ending}", **picture_info(facts(), ending))
    content = (tmp_path / f"a{ending}").read_bytes()
    start = content.index(b"MM\0*")
    entry = content.index(b"\x92\x86", start)
    assert content[entry + 2 : entry + 4] == b"\x00\x07"
    assert comment(tmp_path / f"a{ending}").startswith("龙\nSteps: 1")
