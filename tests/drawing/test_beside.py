"""Branches beside the model's own: told by options and rows, written into pictures, drawn again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_branch

from bdm import Request
from bdm.cli import main
from bdm.drawing.picture_reading import picture_request, picture_texts

PLAIN = ["--model", "model", "--steps", "2", "--seed", "3", "--guidance", "3"]


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    """A model, and another one whose branch is another."""
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(11)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    make_branch(pipe.unet).save_pretrained(tmp_path / "other/branch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_a_picture_is_the_pipelines_and_is_drawn_again(folder, pipe, capsys):
    said = ["--beside", "other:0.7", "--beside-prompt", "红灯笼", "--beside-negative", "灰色"]
    assert main(["infer", "龙", *PLAIN, *said, "--out", "a.png"]) == 0, capsys.readouterr().err
    assert str(folder) not in "".join(picture_texts(Path("a.png")))
    (use,) = picture_request(Path("a.png")).beside
    assert (use.prompt, use.negative, use.scale, use.file.name) == ("红灯笼", "灰色", 0.7, "other")
    assert use.file.hash

    other = type(pipe).from_pretrained("other")
    pipe.add_branch("other", other.branch, other.native_text_encoder)
    told = {"prompt": "红灯笼", "negative_prompt": "灰色", "scale": 0.7}
    settings = dict(num_inference_steps=2, guidance_scale=3.0, beside={"other": told})
    (ours,) = pipe("龙", generator=torch.Generator().manual_seed(3), **settings).images
    assert np.abs(np.asarray(ours).astype(int) - pixels("a.png")).max() <= 1

    shutil.move("other", "elsewhere")
    again = ["infer", "--from", "a.png", "--models", ".", "--out", "b.png"]
    assert main(again) == 0, capsys.readouterr().err
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert main([*again[:-1], "c.png", "--beside-prompt", "龙"]) == 0, capsys.readouterr().err
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_rows_tell_it_each_their_own(folder, capsys):
    told = ("红灯笼", "月饼", "")
    rows = [{"prompt": "龙", "seed": 3} | ({"beside_prompt": text} if text else {}) for text in told]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["infer", *PLAIN, "--prompts", "rows.jsonl", "--batch", "3", "--out", "drawn"]
    assert main([*command, "--beside", "other:4"]) == 0, capsys.readouterr().err
    paths = sorted(Path("drawn").glob("*.png"))
    assert [picture_request(path).beside[0].prompt for path in paths] == list(told)
    first, second, third = map(pixels, paths)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--beside", "other"], "1 branches beside the model's own and 0 --beside-prompt"),
        (["--beside-prompt", "龙"], "0 branches beside the model's own and 1 --beside-prompt"),
        (["--beside", "other:1:0.5", "--beside-prompt", "龙"], "numbers behind the file"),
        (["--beside", "nowhere", "--beside-prompt", "龙"], "nowhere"),
        (["--beside", "model/vae", "--beside-prompt", "龙"], "branch"),
        (["--beside", "other", "--beside-prompt", "[龙:月饼:0.5]"], "schedules words"),
    ],
)
def test_mistakes_are_told(folder, options, told, capsys):
    assert main(["infer", "龙", *PLAIN, *options, "--out", "a.png"]) == 2
    assert told in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_a_row_without_a_branch_to_tell_is_named(folder, capsys):
    Path("rows.jsonl").write_text('{"prompt": "龙", "beside_prompt": "月饼"}', encoding="utf-8")
    assert main(["infer", *PLAIN, "--prompts", "rows.jsonl", "--out", "drawn"]) != 0
    assert "says beside_prompt, and there are 0 branches" in capsys.readouterr().err


def test_its_json_comes_back():
    said = {"prompt": "龙", "beside": [{"file": {"name": "other"}, "prompt": "月饼", "end": 0.5}]}
    request = Request.from_json(said)
    assert Request.from_json(json.dumps(request.to_json())) == request
    assert "name" not in request.essence()["beside"][0]["file"]
    assert Request.from_json({"prompt": "龙"}).beside == ()
