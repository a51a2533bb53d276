import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bdm.cli import DEFAULT_MODEL, main
from bdm.grid import labelled_grid, save_picture
from bdm.picture_info import describe, picture_info

ROOT = Path(__file__).parent.parent
needs_weights = pytest.mark.skipif(not (DEFAULT_MODEL / "model_index.json").exists(), reason="assets/emoji is not there")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "龙", "--model", "/no/such/model"], "no such folder"),
        (["infer", "龙", "--sampler", "Eular"], "unknown sampler 'Eular'"),
        (["infer", "龙", "--out", "x.bmp"], "allowed endings"),
        (["infer", "龙", "--steps", "0"], "must be at least 1"),
        (["train", "configs/none.yaml"], "No such file"),
        (["train", str(ROOT / "configs/quickstart.yaml"), "optimiser.steps=3"], "optimiser: unknown key"),
        (["train", str(ROOT / "configs/sd15_chinese_clip.yaml"), "data.path=/no/data"], "metadata.jsonl: no such file"),
        (["evaluate", str(ROOT / "configs/emoji/evaluate.yaml"), "judge=/no/judge"], "is not a judge's folder"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_dry_run_prints_the_resolved_configuration(capsys):
    assert main(["train", str(ROOT / "configs/sd15_chinese_clip.yaml"), "--dry-run", "optimizer.steps=2000"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 2000" in printed
    assert "batch_size: 3200" in printed


def test_help_needs_no_heavy_import():
    code = "import sys, bdm.cli; bdm.cli._parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@needs_weights
def test_infer_draws_with_the_shipped_weights(tmp_path, capsys):
    out = tmp_path / "lantern.png"
    arguments = ["infer", "红灯笼，蓝色背景", "--out", str(out), "--steps", "4", "--seed", "3"]
    assert main(arguments) == 0
    picture = Image.open(out)
    assert picture.size == (32, 32)
    assert json.loads(picture.text["bdm"])["prompt"] == "红灯笼，蓝色背景"
    assert main([*arguments, "--count", "2"]) == 0
    assert Image.open(tmp_path / "lantern-0.png").tobytes() == picture.tobytes(), "picture i uses seed + i"
    assert main(["infer", "龙", "--height", "30", "--out", str(out)]) == 2
    assert "height 30" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_chinese_facts_survive_in_the_picture(tmp_path, ending):
    facts = describe("红灯笼", "模糊", "best", "", 7, 30, 7.5, "DPM++ 2M", 1.0, (32, 32), "emoji")
    path = tmp_path / f"a{ending}"
    save_picture(Image.new("RGB", (32, 32)), path, **picture_info(facts, ending))
    with Image.open(path) as picture:
        if ending == ".png":
            text = picture.text["parameters"]
            assert json.loads(picture.text["bdm"]) == facts
        else:
            comment = picture.getexif().get_ifd(0x8769)[0x9286]
            text = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert text.startswith("红灯笼\nNegative prompt: 模糊\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 32x32")


def test_labels_wrap_and_every_picture_has_its_place():
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    sheet = labelled_grid(pictures, ["红灯笼，蓝色背景", "a long English label", ""], columns=2, scale=4)
    assert sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((80, 10)) == (0, 128, 0)
    assert sheet.width == 2 * 64 + 3 * 4
