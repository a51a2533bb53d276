"""Drawing prompt files: no picture depends on what is drawn beside it, or ends another."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("龙\n月饼\n饺子\n红包\n龙\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["--prompts", "prompts.txt", "--model", "model", "--steps", "2"]


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder).iterdir())}


def same(one, other):
    """Equal pictures but for how sums are rounded."""
    return one.keys() == other.keys() and all(abs(one[name] - other[name]).max() <= 1 for name in one)


def test_pictures_are_the_same_alone_in_batches_and_when_drawn_again(folder, capsys):
    assert main(["infer", *COMMAND, "--batch", "2", "--out", "a"]) == 0
    drawn = pixels("a")
    assert list(drawn) == [f"0000{i}.png" for i in range(5)]
    assert abs(drawn["00000.png"] - drawn["00004.png"]).max() > 1, "another seed"
    assert (
        main(["infer", "月饼", "--model", "model", "--steps", "2", "--seed", "1", "--out", "alone.png"]) == 0
    )
    assert abs(np.asarray(Image.open("alone.png")).astype(int) - drawn["00001.png"]).max() <= 1
    (folder / "a/00003.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in (folder / "a").iterdir()}
    assert main(["infer", *COMMAND, "--batch", "2", "--out", "a"]) == 0
    assert {path.name for path in (folder / "a").iterdir()} == set(drawn)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items()), (
        "what is there is not drawn again"
    )
    assert "5 pictures in a: 1 drawn, 4 kept\n" in capsys.readouterr().out
    # What changed in the file is drawn in place of what is there, and said.
    (folder / "prompts.txt").write_text("龙\n月饼\n虎\n红包\n龙\n马\n", encoding="utf-8")
    assert main(["infer", *COMMAND, "--batch", "2", "--out", "a"]) == 0
    assert "6 pictures in a: 1 drawn, 1 redrawn, 4 kept\n" in capsys.readouterr().out
    changed = {name for name, one in pixels("a").items() if abs(one - drawn.get(name, 0)).max() > 1}
    assert changed == {"00002.png", "00005.png"}
    assert main(["infer", *COMMAND, "--out", "a", "--steps", "3"]) == 0
    assert "6 pictures in a: 6 redrawn\n" in capsys.readouterr().out
    assert main(["infer", *COMMAND, "--out", "a", "--steps", "3", "--redraw"]) == 0
    assert "6 pictures in a: 6 redrawn\n" in capsys.readouterr().out


def test_processes_share_the_pictures(folder):
    assert main(["infer", *COMMAND, "--batch", "1", "--out", "one"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "infer.py")]
    run = subprocess.run(
        [*launch, *COMMAND, "--batch", "1", "--out", "two", "--device", "cpu"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "3/3" in run.stderr, "of five, the first process draws three"
    assert same(pixels("two"), pixels("one"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_of_ray_share_the_pictures(folder):
    ray = pytest.importorskip("ray")
    assert main(["infer", *COMMAND, "--batch", "1", "--out", "one"]) == 0
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        assert main(["infer", *COMMAND, "--batch", "1", "--out", "two", "--engine", "ray"]) == 0
        assert (
            main(["infer", *COMMAND, "--batch", "1", "--out", "none", "--height", "30", "--engine", "ray"])
            == 2
        )
    finally:
        ray.shutdown()
    assert same(pixels("two"), pixels("one"))


def status(capsys, *arguments):
    """(exit status, the lines that are not a progress bar's)."""
    capsys.readouterr()
    code = main(["infer", *arguments])
    said = capsys.readouterr()
    return code, [line for line in (said.out + said.err).splitlines() if line and "%|" not in line]


@pytest.mark.parametrize("batch", ["1", "2", "8"])
def test_odd_lines_end_none_of_the_others(folder, capsys, batch):
    rows = ['{"prompt": "龙"}', '{"prompt": "红灯笼\\ud83d"}', "{", '{"prompt": "月饼", "seed": 1e30}',
            '{"prompt": "饺子", "guidance": 1e38}',
            '{"prompt": "红\u2028包"}', '{"prompt": "虎", "seed": 99999999999999999999999}']  # fmt: skip
    (folder / "odd.JSONL").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    options = ["--prompts", "odd.JSONL", "--model", "model", "--steps", "2", "--out", "a", "--batch", batch]
    code, said = status(capsys, *options)
    assert code == 3
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["00000.png", "00005.png"]
    assert said[-2] == "2 pictures in a: 2 drawn, 5 failed"
    assert said[-1].startswith("error: 5 gave no picture and 2 did: line 2 is no text")
    for number in (2, 3, 4, 5, 7):
        assert f"line {number} " in said[-1]
    assert "line 5 (00004.png) cannot be drawn: guidance_scale 1e+38 is larger" in said[-1]
    alone = ["龙", "--model", "model", "--steps", "2", "--seed", "0", "--out", "alone.png"]
    assert main(["infer", *alone]) == 0
    assert abs(np.asarray(Image.open("alone.png")).astype(int) - pixels("a")["00000.png"]).max() <= 1
    # Mended, the lines are drawn under their numbers, and only they.
    times = {path: path.stat().st_mtime_ns for path in (folder / "a").iterdir()}
    (folder / "odd.JSONL").write_text("\n".join(['{"prompt": "龙"}'] * 7), encoding="utf-8")
    assert status(capsys, *options) == (0, ["7 pictures in a: 5 drawn, 1 redrawn, 1 kept"])
    assert (folder / "a/00000.png").stat().st_mtime_ns == times[folder / "a/00000.png"]


def test_what_every_line_fails_of_is_said_once(folder, capsys):
    code, said = status(capsys, *COMMAND, "--out", "a", "--height", "30")
    assert code == 2
    assert said[:-1] == ["0 pictures in a: 5 failed"]
    assert "height 30 is not a positive multiple of 8" in said[-1]
    assert "so does every other line" in said[-1]
    code, said = status(capsys, *COMMAND, "--out", "a", "--branch-scale", "1e30")
    assert code == 2
    assert "branch_scale 1e+30 is larger than what" in said[-1]
    assert "so does every other line" in said[-1]
    assert not [path for path in Path("a").glob("*") if path.suffix == ".png"]


def test_processes_name_the_failures_of_all(folder):
    (folder / "odd.txt").write_bytes("龙\n".encode() + b"\xff\n" + "月饼\n饺子\n".encode())
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "infer.py")]
    options = ["--prompts", "odd.txt", "--model", "model", "--steps", "2", "--batch", "1", "--device", "cpu"]
    run = subprocess.run([*launch, *options, "--out", "a"], capture_output=True, text=True)
    assert "exitcode  : 3" in run.stderr.replace("exitcode : 3", "exitcode  : 3"), run.stderr
    assert "3 pictures in a: 3 drawn, 1 failed" in run.stdout
    assert "error: 1 gave no picture and 3 did: line 2 is no UTF-8" in run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "99999999999999999999999"], "seed 99999999999999999999999: give a whole number"),
        (["--seed", "-1"], "seed -1: give a whole number"),
        (["--seed", str(2**63 - 1), "--count", "2"], f"seed {2**63}: give a whole number"),
        (["--guidance", "nan"], "--guidance nan: give a finite number"),
        (["--guidance", "inf"], "--guidance inf"),
        (["--branch-scale=-inf"], "--branch-scale -inf"),
        (["--branch-scale", "1e30"], "branch_scale 1e+30 is larger than what"),
        (["--guidance", "1e38"], "guidance_scale 1e+38 is larger than what"),
        (["--out", "x" * 300 + ".png"], "File name too long"),
        (["--out", "x/" * 3000 + "a.png"], "File name too long"),
        (["--model", "x" * 5000], "no such folder"),
        (["--lora", "x" * 5000 + ".safetensors"], "x" * 100),
        (["--lora", "x" * 5000], "x" * 100),
        (["--negative", "\udcff"], r"the text '\udcff' holds half a character"),
        (["--prompt-en", "a \ud83d dragon"], "holds half a character"),
    ],
)
def test_numbers_and_paths_that_mean_nothing(folder, capsys, options, message):
    code, said = status(capsys, "龙", "--model", "model", "--steps", "1", *options)
    assert code == 2
    assert message in said[-1]
    assert said[-1].startswith("error: ")
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".JPG"])
def test_prompts_and_names_of_any_length(folder, capsys, ending):
    name = "x" * (255 - len(ending)) + ending
    code, _ = status(capsys, "红灯笼，" * 9000, "--model", "model", "--steps", "1", "--out", name)
    assert code == 0
    with Image.open(folder / name) as picture:
        assert picture.size == (64, 64)


def test_names_that_are_no_text(folder, capsys):
    """The libraries that read models take none; files that are written may have any."""
    code, said = status(capsys, "龙", "--model", "model", "--steps", "1", "--out", "a\udcfe.png")
    assert (code, said) == (0, [r"a\udcfe.png"])
    (folder / "model").rename(folder / "m\udcffdel")
    code, said = status(capsys, "龙", "--model", "m\udcffdel", "--steps", "1")
    assert code == 2
    assert len(said) == 1
    assert said[0].startswith(r"error: m\udcffdel")
