"""What is written into a picture: no text of any length or kind loses it, and others' programs read it."""

import dataclasses
import json

import pytest
from PIL import Image

from bdm import FileRef, PluginUse, Request
from bdm.drawing.grid import save_picture
from bdm.drawing.picture_info import parameters_text, picture_info
from bdm.drawing.picture_reading import picture_request, picture_texts
from bdm.drawing.request import Versions
from bdm.errors import UserError

ENDINGS = [".png", ".webp", ".jpg", ".jpeg", ".JPG"]


def request(**changes):
    said = {"prompt": "龙", "seed": 7, "steps": 1, "guidance": 2.0, "sampler": "DDIM",
            "model": FileRef("emoji", "0123456789")}  # fmt: skip
    return Request(**said | changes)


def adapter(name, **settings):
    return PluginUse(kind="adapter", file=FileRef(f"{name}.safetensors", "0" * 12), name=name, **settings)


def written(path, said, side=32):
    picture = Image.new("RGB", (side, side), "red")
    save_picture(picture, path, **picture_info(said, path.suffix, picture.size))
    return path


LONG = {
    "prompt": {"prompt": "红灯笼，" * 9000},
    "negative": {"negative": "bad " * 9000},
    "both": {"prompt": "红灯笼，" * 9000, "negative": "模糊，" * 12000},
    "emoji": {"prompt": "👩‍🔬" * 20000, "negative": "🐉" * 50000},
    "a long and a short one": {"prompt": "龙，" * 20000, "negative": "模糊"},
    "English": {"prompt_en": "a: dragon, " * 9000},
    "a million": {"prompt": "x" * 10**6},
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("ending", ENDINGS)
def test_long_texts_lose_neither_picture_nor_json(tmp_path, name, ending):
    said = request(**LONG[name])
    path = written(tmp_path / f"a{ending}", said)
    assert picture_request(path) == said
    with Image.open(path) as picture:
        assert picture.convert("RGB").getpixel((5, 5))[0] > 200
    text = picture_texts(path)[0]
    prompt, *_, settings = text.split("\n")
    assert settings.startswith(
        "Steps: 1, Sampler: DDIM, CFG scale: 2, Seed: 7, Size: 32x32, Model hash: 0123"
    )
    if ending in (".png", ".webp"):
        assert text == parameters_text(said, (32, 32))
        return
    assert len(text.encode("utf-16-be")) < 65_533
    assert name == "English" or len(text.encode("utf-16-be")) > 60_000, "as much as there is room for"
    assert said.prompt.startswith(prompt.removesuffix("…"))
    if said.negative:
        (negative,) = [line for line in text.split("\n") if line.startswith("Negative prompt: ")]
        assert said.negative.startswith(negative.removeprefix("Negative prompt: ").removesuffix("…"))
    if name == "a long and a short one":
        assert "\nNegative prompt: 模糊\n" in text
    text.encode("utf-8")  # no character was cut in two


def test_settings_that_are_too_long_are_left_out(tmp_path):
    said = request(plugins=[adapter("x" * 200 + str(i)) for i in range(300)])
    path = written(tmp_path / "a.jpg", said)
    assert picture_texts(path)[0] == ""
    assert picture_request(path) == said


def test_names_write_no_lines_of_their_own():
    said = request(plugins=[adapter("ink\nSteps: 99, Seed: 1")], model=FileRef("a\nSteps: 98", "1"))
    text = parameters_text(said, (8, 8))
    assert text.count("\n") == 1
    assert text.count("Steps: ") == 1
    assert text.count("Seed: ") == 1


def test_all_that_a1111_has_a_name_for():
    said = request(
        negative="模糊",
        prompt_en="ink style, best: quality",
        plugins=[
            adapter("ink", strength=0.8, text_strength=0.8),
            adapter("line", strength=0.5, text_strength=0.25),
            PluginUse(kind="checkpoint", file=FileRef("style.safetensors", "c" * 10), name="style"),
            PluginUse(kind="vae", file=FileRef("colours.safetensors", "d" * 10), name="colours"),
            PluginUse(kind="embedding", file=FileRef("mood.pt", "e" * 10), name="mood"),
        ],
        sampler="DPM++ 2M",
        schedule="Karras",
        clip_skip=2,
        guidance=7.5,
        enlarge=2,
        versions=Versions("0.1.0"),
    )
    assert parameters_text(said, (64, 64)) == (
        "龙 <lora:ink:0.8> <lora:line:0.25:0.5>\nNegative prompt: 模糊\n"
        "Steps: 1, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x64, "
        "Model hash: cccccccccc, Model: style, VAE hash: dddddddddd, VAE: colours.safetensors, "
        "Pipeline hash: 0123456789, Pipeline: emoji, Clip skip: 2,"
        ' English prompt: "ink style, best\\u003a quality", Lora hashes: "ink: 000000000000, line:'
        ' 000000000000", TI hashes: "mood: eeeeeeeeee", Enlarged: 2, Version: bdm 0.1.0'
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_piexif_reads_the_comment(tmp_path, ending):
    piexif = pytest.importorskip("piexif")
    helper = pytest.importorskip("piexif.helper")
    if ending == ".png":
        pytest.skip("PNG has texts of its own")
    path = written(tmp_path / f"a{ending}", request(prompt="龙" * 5000))
    exif = piexif.load(str(path))["Exif"]
    comment = helper.UserComment.load(exif[piexif.ExifIFD.UserComment])
    assert comment == picture_texts(path)[0]
    piexif.dump(piexif.load(str(path)))  # what it read it can write


@pytest.mark.parametrize("ending", ENDINGS)
def test_sd_parsers_reads_it(tmp_path, ending):
    sd_parsers = pytest.importorskip("sd_parsers")
    said = request(negative="模糊", prompt_en="a: b, Steps: 9", plugins=[adapter("ink", strength=0.5)],
                   schedule="Karras")  # fmt: skip
    found = sd_parsers.ParserManager().parse(written(tmp_path / f"a{ending}", said))
    (sampler,) = found.samplers
    assert found.generator.value == "AUTOMATIC1111"
    assert [prompt.value for prompt in found.prompts] == ["龙 <lora:ink:0.5>"]
    assert [prompt.value for prompt in found.negative_prompts] == ["模糊"]
    assert sampler.name == "DDIM"
    wanted = {"steps": "1", "cfg_scale": "2", "seed": "7", "scheduler": "Karras"}
    assert wanted.items() <= sampler.parameters.items()
    assert (sampler.model.name, sampler.model.hash) == ("emoji", "0123456789")
    assert found.metadata["Size"] == "32x32"


@pytest.mark.parametrize("ending", ENDINGS)
def test_sd_prompt_reader_reads_it(tmp_path, ending):
    readers = pytest.importorskip("sd_prompt_reader.image_data_reader")
    said = request(negative="blurry", prompt="dragon", prompt_en="a: b, Steps: 9")
    found = readers.ImageDataReader(str(written(tmp_path / f"a{ending}", said)))
    assert found.tool == "A1111 webUI"
    assert (found.positive, found.negative) == ("dragon", "blurry")
    wanted = {"model": "emoji", "sampler": "DDIM", "seed": "7", "cfg": "2", "steps": "1", "size": "32x32"}
    assert found.parameter == wanted


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_pictures_of_others_are_told_apart(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match="carries no bdm JSON"):
        picture_request(path)
    said = dataclasses.replace(request(), seed=8)
    written(path, said)
    content = path.read_bytes()
    assert picture_request(path).seed == 8
    path.write_bytes(content.replace(b'"seed": 8', b'"sead": 8'))
    with pytest.raises(UserError, match="sead|damaged|cannot be read"):
        picture_request(path)
    for cut in (0, 10, len(content) // 2):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError):
            picture_request(path)
    with pytest.raises(UserError, match="cannot be read"):
        picture_request(tmp_path / "none.png")


def test_the_json_is_a_row_of_a_prompt_file(tmp_path):
    from bdm.drawing.prompt_file import read_prompt_file

    said = request(plugins=[adapter("ink")])
    (tmp_path / "a.jsonl").write_text(json.dumps(said.to_json()))
    (row,) = read_prompt_file(tmp_path / "a.jsonl")
    assert row.wrong == ""
    assert Request(**row.said) == said
