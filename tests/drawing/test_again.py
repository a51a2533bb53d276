"""Pictures are drawn again, bit for bit, by what is written in them; what is missing is named."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import bdm
from bdm import FileRef, PluginUse, Request
from bdm.cli import main
from bdm.drawing.picture_reading import picture_request, picture_texts


@pytest.fixture
def folder(pipe, files, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    Image.radial_gradient("L").resize((64, 64)).save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PLAIN = ["infer", "龙", "--model", "model", "--steps", "2", "--seed", "3"]
PLUGINS = {
    "none": [],
    "checkpoint": ["--checkpoint", "style.safetensors"],
    "vae": ["--vae", "colours.safetensors"],
    "adapters": ["--lora", "ink.safetensors:0.7:0.2", "--lora", "shift.safetensors", "--prompt-en", "ink"],
    "embedding": ["--embedding", "mood.pt", "--prompt-en", "mood", "--clip-skip", "2"],
    "controlnet": ["--controlnet", "edges", "--control-image", "photo.png:0.8:0:0.6"],
    "settings": ["--sampler", "DPM++ 2M Karras", "--negative", "模糊", "--guidance", "3.5", "--enlarge", "2",
                 "--guidance-interval", "0.1:0.8", "--branch-scale", "0.5", "--width", "72",
                 "--english-guidance", "2", "--prompt-en", "a: b, c"],
    "image": ["--image", "photo.png", "--strength", "0.6"],
    "mask": ["--image", "photo.png", "--mask", "mask.png", "--mask-blur", "2", "--strength", "1"],
    "outpaint": ["--image", "photo.png", "--outpaint", "0:0:16:8"],
    "hires": ["--hires", "1.5", "--strength", "0.5", "--upscaler", "lanczos", "--tiling", "never"],
    "schedule": ["--branch-schedule", "0:0.5:0,0.5:1:1", "--sampler", "euler", "--schedule", "karras"],
    "world": ["--world", "0.5", "--prompt-en", "dragon"],
    "rules": ["--emphasis", "official", "--chunks", "official", "--negative", "(模糊:1.3)"],
    "grammar": ["--negative", "masterpiece, [a:b:0.5], {红|绿}, (x:1.2) BREAK y"],
}  # fmt: skip


#: The others are as slow, and much like one of these.
QUICK = ("checkpoint", "adapters", "embedding", "controlnet", "settings", "mask", "hires")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PLUGINS]
)
def test_a_picture_is_drawn_again_bit_for_bit(folder, name, capsys):
    """With all files renamed and in another folder."""
    assert main([*PLAIN, "--out", "a.png", *PLUGINS[name]]) == 0, capsys.readouterr().err
    assert str(folder) not in "".join(picture_texts(Path("a.png")))
    (folder / "elsewhere/Lora").mkdir(parents=True)
    for i, path in enumerate(["style.safetensors", "colours.safetensors", "ink.safetensors",
                              "shift.safetensors", "mood.pt", "edges", "model"]):  # fmt: skip
        shutil.move(path, folder / f"elsewhere/renamed-{i}{Path(path).suffix}")
    shutil.move("photo.png", "renamed.png")
    shutil.move("mask.png", "renamed-mask.png")
    assert main(["infer", "--from", "a.png", "--models", "elsewhere", "--out", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert "WARNING" not in capsys.readouterr().err
    shutil.rmtree("elsewhere")
    assert main(["infer", "--from", "a.png", "--out", "c.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: not here: ")
    for file in picture_request(Path("a.png")).files():
        assert file.name in ("photo.png", "mask.png") or f"{file.name} (hash {file.hash})" in error
    assert not Path("c.png").exists()


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_every_format_tells_all(folder, ending, capsys):
    assert main([*PLAIN, "--out", f"a{ending}", "--lora", "ink.safetensors"]) == 0
    assert main(["infer", "--from", f"a{ending}"]) == 0
    assert Path(f"a{ending}").read_bytes() == Path(f"a-again{ending}").read_bytes()
    # Options that are given beside it change that alone.
    assert main(["infer", "月饼", "--from", f"a{ending}", "--steps", "1", "--out", "b.png"]) == 0
    assert picture_request(Path("b.png")) == dataclasses.replace(
        picture_request(Path(f"a{ending}")), prompt="月饼", steps=1
    )
    capsys.readouterr()
    assert main(["info", f"a{ending}"]) == 0
    said = capsys.readouterr().out
    assert "  龙 <lora:ink:1>\n  Steps: 2, Sampler: DDIM" in said
    assert "needs ink.safetensors (hash " in said
    assert main(["info", "--json", f"a{ending}"]) == 0
    assert Request.from_json(capsys.readouterr().out) == picture_request(Path(f"a{ending}"))
    assert main(["info", "photo.png"]) == 2
    assert "says nothing of how it was made" in capsys.readouterr().err
    assert main(["infer", "--from", "photo.png"]) == 2
    assert "carries no bdm JSON" in capsys.readouterr().err


def test_other_versions_are_mentioned(folder, caplog):
    assert main([*PLAIN, "--out", "a.png"]) == 0
    request = picture_request(Path("a.png"))
    other = dataclasses.replace(request, versions=dataclasses.replace(request.versions, torch="1.0"))
    with Image.open("a.png") as picture:
        bdm.drawing.painter.Drawn(picture.copy(), other).save("b.png")
    assert main(["infer", "--from", "b.png", "--out", "c.png"]) == 0
    assert "the picture was drawn with torch 1.0, here " in caplog.text


def test_a_picture_that_is_there_is_kept(folder, capsys):
    assert main([*PLAIN, "--out", "a.png"]) == 0
    before = os.stat("a.png").st_mtime_ns
    capsys.readouterr()
    assert main([*PLAIN, "--out", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n1 kept\n"
    assert os.stat("a.png").st_mtime_ns == before
    assert main([*PLAIN, "--out", "a.png", "--lora", "ink.safetensors"]) == 0
    assert capsys.readouterr().out == "a.png\n1 redrawn\n"
    # A file of the same name that is another one.
    shutil.copy("shift.safetensors", "ink.safetensors")
    assert main([*PLAIN, "--out", "a.png", "--lora", "ink.safetensors"]) == 0
    assert capsys.readouterr().out == "a.png\n1 redrawn\n"


def test_python_draws_what_the_command_draws(folder, capsys):
    assert main([*PLAIN, "--out", "a.png", "--lora", "ink.safetensors:0.5", "--prompt-en", "x"]) == 0
    ink = PluginUse(kind="adapter", file=FileRef.to("ink.safetensors"), strength=0.5)
    wanted = Request(prompt="龙", prompt_en="x", model=FileRef.to("model"), steps=2, seed=3, plugins=[ink])
    none = dataclasses.replace(wanted, guidance=1e38)
    pictures = bdm.draw([wanted, none, dataclasses.replace(wanted, seed=4)])
    assert str(pictures.counts) == "2 drawn, 1 failed"
    assert pictures[1] is None
    (failure,) = pictures.failed
    assert "guidance_scale 1e+38" in str(failure)
    pictures[0].save(folder / "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    drawn = bdm.draw([wanted, none], out="python", names="[seed]-[prompt]")
    assert str(drawn.counts) == "1 drawn, 1 failed"
    assert Path("python/3-龙.png").read_bytes() == Path("a.png").read_bytes()
    assert str(bdm.draw(wanted, out="python", names="[seed]-[prompt]").counts) == "1 kept"
    # By name or hash alone.
    by_hash = dataclasses.replace(
        wanted, model=pictures[0].request.model, plugins=pictures[0].request.plugins
    )
    by_hash = Request.from_json(by_hash.to_json())
    assert by_hash.plugins[0].file.source is None
    assert bdm.draw(by_hash, models=[folder])[0].image.tobytes() == pictures[0].image.tobytes()


def test_five_forms_draw_byte_equal_pictures(folder):
    rows = [{"prompt": "红灯笼", "seed": 5}, {"prompt": "龙", "seed": 6, "negative": "模糊", "steps": 1}]
    table = "prompt,seed,negative,steps\n红灯笼,5,,\n龙,6,模糊,1\n"
    lines = "--prompt 红灯笼 --seed 5\n--prompt '龙' --seed 6 --negative_prompt 模糊 --steps 1\n"
    forms = {
        "a.txt": lines.encode("utf-16"),
        "b.json": json.dumps(rows).encode(),
        "c.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8-sig"),
        "d.csv": table.encode("gb18030"),
        "e.tsv": table.replace(",", "\t").encode(),
    }
    found = []
    for name, content in forms.items():
        Path(name).write_bytes(content)
        assert main(["infer", "--prompts", name, "--model", "model", "--steps", "2", "--out", name[0]]) == 0
        found.append([path.read_bytes() for path in sorted(Path(name[0]).iterdir())])
    assert len(found[0]) == 2
    assert all(one == found[0] for one in found)


def test_pictures_do_not_hang_on_what_was_drawn_before(folder):
    """Alone or with others, with the English text encoder there or not."""
    first = [{"prompt": "虎", "prompt_en": "a tiger"}, {"prompt": "龙", "seed": 3}, {"prompt": "长" * 120}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, first)))
    assert main(["infer", "--prompts", "a.jsonl", "--model", "model", "--steps", "2", "--out", "a"]) == 0
    assert main([*PLAIN, "--out", "b.png"]) == 0
    assert Path("a/00001.png").read_bytes() == Path("b.png").read_bytes()


def test_trigger_words_that_a_prompt_lacks(folder, caplog):
    note = {"trainedWords": ["ink style, brush", "水墨"]}
    Path("ink.civitai.info").write_text(json.dumps(note), encoding="utf-8")
    assert main([*PLAIN, "--lora", "ink.safetensors", "--prompt-en", "a brushed dragon"]) == 0
    assert "holds none of its words: ink style, brush, 水墨" in caplog.text
    caplog.clear()
    assert main([*PLAIN, "--lora", "ink.safetensors", "--prompt-en", "Brush, dragon"]) == 0
    assert not caplog.text
    assert main([*PLAIN, "--embedding", "mood.pt", "--prompt-en", "moody"]) == 0
    assert "mood acts through the English prompt" in caplog.text


def start(arguments):
    """Run a command in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        torch.set_num_threads(1)
        os._exit(main(arguments))
    return child


def drawn_in(folder):
    """When each picture in a folder was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to kill")
@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_nothing_is_lost_or_drawn_twice(folder, moments):
    lines = [f"龙{i}\n" for i in range(10 * moments)]
    Path("a.txt").write_text("".join(lines), encoding="utf-8")
    command = ["infer", "--prompts", "a.txt", "--model", "model", "--steps", "1", "--width", "16", "--height",
               "16", "--device", "cpu"]  # fmt: skip
    assert main([*command, "--out", "whole"]) == 0
    wanted = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    chance, part, known, killed = random.Random(0), Path("part"), {}, 0
    for _ in range(moments):
        child, more = start([*command, "--out", "part"]), chance.randint(0, 2)
        while len(drawn_in(part)) < min(len(known) + more, len(wanted) - 1):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        there = drawn_in(part)
        assert known.items() <= there.items(), "drawn twice, or lost"
        assert all((part / name).read_bytes() == wanted[name] for name in there)
        known = there
    assert killed > moments / 2, "they were still at work"
    assert main([*command, "--out", "part"]) == 0
    assert {path.name: path.read_bytes() for path in part.glob("[!.]*")} == wanted
    assert known.items() <= drawn_in(part).items()
    assert not list(part.glob(".*")), "what the killed left is gone"
