"""A1111's text as a request: what bdm writes comes back, what others wrote is read or named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bdm import Approximation, FileRef, Mode, PluginUse, PromptRules, Request
from bdm.cli import main
from bdm.drawing.a1111_request import read_a1111
from bdm.drawing.a1111_text import read_pairs, read_parameters
from bdm.drawing.comfy_graph import graph_lines
from bdm.drawing.complete import complete
from bdm.drawing.library import Library
from bdm.drawing.picture_info import parameters_text
from bdm.drawing.picture_reading import picture_request
from bdm.drawing.request import Versions
from bdm.errors import UserError

VERSIONS = Versions("0.1.0")
OURS = {
    "plain": {},
    "texts": {"prompt": "红灯笼，\n蓝色", "negative": "模糊, (x:1.2)", "prompt_en": 'a: "b", c\nd',
              "negative_en": "e"},
    "numbers": {"steps": 7, "seed": 2**62, "guidance": 3.25, "clip_skip": 2, "enlarge": 3,
                "precision": "fp16"},
    "sampler": {"sampler": "DPM++ 2M", "schedule": "Karras"},
    "branch": {"branch_scale": 0.5, "branch_start": 0.25, "branch_end": 0.75,
               "branch_schedule": "0:0.2:0,0.2:1:1"},
    "world": {"world": 0.5, "prompt_en": "dragon", "english_guidance": 2.0},
    "rules": {"rules": PromptRules("official", "official", False, True, "full")},
    "punctuation": {"rules": PromptRules(punctuation="half")},
    "approximation": {"approximation": Approximation(0.1, 0.8, 2, 3)},
    "hires": {"mode": Mode("hires", (), (("scale", 1.5), ("second_steps", 4), ("strength", 0.5),
                                         ("upscaler", "latent bicubic"))), "enlarge": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_what_bdm_writes_comes_back(name):
    said = dict(prompt="龙", width=64, height=72, sampler="Euler", seed=5, guidance=2.0, versions=VERSIONS)
    asked = complete(Request(**said | OURS[name]), Library(), "fp32")
    scale = dict(asked.mode.settings).get("scale", 1) * asked.enlarge
    text = parameters_text(asked, (int(64 * scale), int(72 * scale)))
    read = read_a1111(text, Library())
    assert (read.unknown, read.missing, read.lacks, read.notes) == ((), (), (), ())
    assert complete(read.request, Library(), "fp32").essence() == asked.essence()


def test_files_of_ours_come_back_by_their_hashes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, name in (
        ("Stable-diffusion", "style"),
        ("VAE", "colours"),
        ("Lora", "ink"),
        ("embeddings", "mood"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{name}.safetensors").write_bytes(name.encode() * 9)
    library = Library([tmp_path])
    given = [("checkpoint", "style"), ("vae", "colours"), ("adapter", "ink"), ("embedding", "mood")]
    plugins = [PluginUse(kind=kind, file=FileRef.to(library.find(name, kind))) for kind, name in given]
    plugins[2] = replace(plugins[2], strength=0.7, text_strength=0.2)
    said = Request(prompt="龙", sampler="Euler", width=64, height=64, plugins=plugins, versions=VERSIONS)
    asked = complete(said, library)
    for path in tmp_path.rglob("*.safetensors"):
        path.rename(path.with_name(f"renamed-{path.name}"))
    renamed = Library([tmp_path])
    read = read_a1111(parameters_text(asked, (64, 64)), renamed)
    assert (read.unknown, read.missing) == ((), ())
    assert complete(read.request, renamed).essence() == asked.essence()
    assert read_a1111(parameters_text(asked, (64, 64)), Library()).missing[0].startswith("vae colours.saf")


def test_what_of_ours_no_text_holds_is_named():
    file = FileRef("edges", "0" * 10)
    control = PluginUse(kind="controlnet", file=file, name="edges", picture=FileRef("photo.png", "1" * 16))
    said = Request(prompt="龙", guidance=2.0, sampler="Euler", plugins=(control,), versions=VERSIONS)
    assert "ControlNet 0" in read_a1111(parameters_text(said, (64, 64)), Library()).unknown[0]
    modes = {
        ("image",): Mode("image", (), (("strength", 0.5),)),
        ("image", "mask"): Mode("mask", (), (("blur", 4.0), ("strength", 0.5))),
        ("image", "outpaint"): Mode("outpaint", (), (("left", 8), ("overlap", 4), ("strength", 1.0))),
    }
    for lacks, mode in modes.items():
        text = parameters_text(replace(said, plugins=(), mode=mode), (64, 64))
        read = read_a1111(text, Library())
        assert read.lacks == lacks
        assert dict(mode.settings).items() <= dict(read.request.mode.settings).items()


#: As A1111 and Forge write it.
THEIRS = """(masterpiece:1.2), a dragon, <lora:ink:0.8>, [red:blue:0.5]
second line
Negative prompt: blurry, easynegative
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 123, Size: 512x768, \
Model hash: 0123456789, Model: style_v1, Denoising strength: 0.4, Clip skip: 2, RNG: CPU, \
Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, Lora hashes: "ink: abcdef012345", \
TI hashes: "easynegative: c74b4e810b03", Version: v1.10.1"""


def test_what_a1111_writes_is_read():
    read = read_a1111(THEIRS, Library())
    found = read.request
    assert found.prompt_en == "(masterpiece:1.2), a dragon, <lora:ink:0.8>, [red:blue:0.5]\nsecond line"
    assert (found.prompt, found.negative_en, found.branch_scale) == ("", "blurry, easynegative", 0)
    assert (found.steps, found.guidance, found.seed, found.clip_skip) == (20, 7.0, 123, 2)
    assert (found.sampler, found.schedule, found.width, found.height) == ("DPM++ 2M", "Karras", 512, 768)
    settings = {"scale": 2.0, "second_steps": 10, "strength": 0.4, "upscaler": "latent"}
    assert found.mode == Mode("hires", (), tuple(sorted(settings.items())))
    assert read.unknown == read.notes == ()
    assert read.missing == (
        "adapter ink (hash abcdef012345)",
        "embedding easynegative (hash c74b4e810b03)",
        "checkpoint style_v1 (hash 0123456789)",
    )


BASE = "dragon\nSteps: 4, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"


@pytest.mark.parametrize(
    ("more", "unknown"),
    [
        ("ENSD: 31337", "ENSD: 31337"),
        ("Face restoration: CodeFormer", "Face restoration: CodeFormer"),
        ("Variation seed: 3, Variation seed strength: 0.2", "Variation seed: 3"),
        ('ControlNet 0: "Module: canny, Model: x [1]"', "ControlNet 0: Module: canny, Model: x [1]"),
        ("RNG: NV", "RNG: NV"),
        ("Hires upscale: 2, Hires sampler: DDIM", "Hires sampler: DDIM"),
        ("Hires upscale: 2, Hires resize: 1x3", "Hires resize: 1x3"),
        ("Clip skip: many", "Clip skip: many"),
        ("Seed: 2", "Seed: 2"),
        ("nothing of the kind", "nothing of the kind"),
        ('Hashes: {"hypernet:x": "0123456789"}', "Hashes: hypernet:x"),
        ('Lora hashes: "uncalled: 0123456789ab"', "Lora hashes: uncalled"),
        ("Emphasis: No norm", "Emphasis: No norm"),
    ],
)
def test_what_is_not_recognised_is_named(more, unknown):
    assert unknown in read_a1111(f"{BASE}, {more}", Library()).unknown


def test_samplers_that_cannot_be_are_named_with_the_nearest():
    read = read_a1111(BASE.replace("Euler a", "DPM fast"), Library())
    assert read.unknown[0].startswith(
        "Sampler: DPM fast (sampler DPM fast is none of diffusers'; the nearest"
    )
    assert read.request.sampler == ""
    plain = read_a1111(BASE, Library()).request
    assert (plain.sampler, plain.schedule) == ("Euler a", "Uniform")


def test_other_calls_are_named_and_prompts_divided_by_script():
    text = BASE.replace("dragon", "龙，masterpiece, <hypernet:x:1>, <lora:ink:1:lbw=OUTALL>")
    read = read_a1111(text, Library())
    assert read.unknown == ("<hypernet:x:1>", "<lora:ink:1:lbw=OUTALL>")
    assert (read.request.prompt, read.request.branch_scale) == ("龙", 1)
    assert read.request.prompt_en.startswith("masterpiece, ")
    assert "noise on the GPU" in read.notes[0]


def test_texts_are_taken_apart():
    said = read_parameters(
        'a\nb\nNegative prompt: c\nd\nSteps: 1, X: "y, \\"z\\": 1", A: {"b": [1, 2]}, C: "d'
    )
    assert (said.prompt, said.negative) == ("a\nb", "c\nd")
    assert said.settings == {"Steps": "1", "X": 'y, "z": 1', "A": '{"b": [1, 2]}', "C": '"d'}
    assert read_parameters(f"{BASE}\nTemplate: {{a|b}}, c").prompt == "dragon"
    assert read_pairs("a: 1, b: 2") == {"a": "1", "b": "2"}
    for text in ("", "dragon", "dragon\nSteps: 1, Seed: 2", "\n\n"):
        with pytest.raises(UserError, match="tells no settings"):
            read_parameters(text)


def picture(name, **texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (64, 64)).save(name, pnginfo=info)


def test_a_picture_with_the_text_alone_is_drawn(pipe, files, tmp_path, monkeypatch, capsys, caplog):
    """Ours without its JSON is the same, bit for bit; another's is refused or drawn in part, aloud."""
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    said = ["--model", "model", "--steps", "2", "--seed", "3", "--lora", "ink.safetensors:0.7:0.2",
            "--sampler", "Euler", "--width", "64", "--height", "64", "--prompt-en", "ink, style"]  # fmt: skip
    assert main(["infer", "龙", *said, "--out", "a.png"]) == 0, capsys.readouterr().err
    with Image.open("a.png") as drawn:
        drawn.load()
        text, pixels = drawn.info["parameters"], drawn.tobytes()
    picture("b.png", parameters=text)
    Path("ink.safetensors").rename("renamed.safetensors")
    assert main(["infer", "--from", "b.png", "--models", ".", "--out", "c.png"]) == 0, capsys.readouterr().err
    with Image.open("c.png") as again:
        assert again.tobytes() == pixels
    assert picture_request(Path("c.png")).plugins[0].text_strength == 0.2

    Path("renamed.safetensors").unlink()
    assert main(["infer", "--from", "b.png", "--out", "d.png"]) == 2
    assert "not here: adapter ink (hash " in capsys.readouterr().err
    picture("e.png", parameters=f"{BASE}, ENSD: 31337, Model hash: 0123456789")
    command = ["infer", "--from", "e.png", "--model", "model", "--steps", "1", "--out", "f.png"]
    assert main(command) == 2
    assert "what is not drawn here: ENSD: 31337; draw the rest with --partly" in capsys.readouterr().err
    assert not Path("f.png").exists()
    assert main([*command, "--partly"]) == 0
    assert "another picture comes out, without ENSD: 31337" in caplog.text
    assert picture_request(Path("f.png")).branch_scale == 0
    picture("g.png", parameters=f"{BASE}, Denoising strength: 0.5")
    assert main(["infer", "--from", "g.png", "--model", "model", "--out", "h.png"]) == 2
    assert "its text does not hold; give --image" in capsys.readouterr().err
    assert main(["info", "e.png"]) == 0
    told = capsys.readouterr().out
    assert "not drawn here: ENSD: 31337" in told
    assert "not here: checkpoint  (hash 0123456789)" in told
    assert main(["info", "--json", "e.png"]) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == ["ENSD: 31337"]


GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "style.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dragon", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["1", 1]}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
    "5": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 20, "cfg": 3.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                   "denoise": 1.0, "positive": ["6", 0], "negative": ["3", 0], "latent_image": ["4", 0]},
    },
}  # fmt: skip


def test_comfyuis_graph_is_told_and_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture("a.png", prompt=json.dumps(GRAPH), workflow="{}")
    assert main(["info", "a.png"]) == 0
    told = capsys.readouterr().out
    for line in (
        "KSampler: seed: 7, steps: 20, cfg: 3.5, sampler_name: dpmpp_2m, scheduler: karras, denoise: 1.0",
        "positive: a dragon",
        "negative: blurry",
        "Size: 512x768",
        "ckpt_name: style.safetensors",
        "2 CLIPTextEncode",
        "not drawn here",
    ):
        assert line in told
    assert main(["infer", "--from", "a.png"]) == 2
    assert "carries ComfyUI's graph, which is not drawn here" in capsys.readouterr().err
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(GRAPH)
    Image.new("RGB", (8, 8)).save("b.webp", exif=exif)
    assert main(["info", "b.webp"]) == 0
    assert "negative: blurry" in capsys.readouterr().out
    loop = {"1": {"class_type": "KSampler", "inputs": {"steps": 1, "positive": ["2", 0]}},
            "2": {"class_type": "X", "inputs": {"conditioning": ["2", 0]}}}  # fmt: skip
    assert len(graph_lines(json.dumps(loop))) == 2
    for wrong in ("", "[]", "{}", '{"1": 3}', '{"1": {}}', "x"):
        with pytest.raises(UserError, match="the picture"):
            graph_lines(wrong)
