"""Prompt files: which pictures they ask for, and that no picture depends on what is drawn beside it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm.cli import main
from bdm.drawing.requests import Request, missing, read_requests
from bdm.errors import UserError

ROOT = Path(__file__).parents[2]


def test_lines_become_requests(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff红灯笼，蓝色背景\n\n  月饼 \n", encoding="utf-8")
    texts = {"negative": "模糊"}
    assert read_requests(file, Path("out"), 7, texts=texts) == [
        Request(Path("out/00000.png"), 7, "红灯笼，蓝色背景", "模糊"),
        Request(Path("out/00001.png"), 8, "月饼", "模糊"),
    ]
    paths = [(str(r.path), r.seed) for r in read_requests(file, Path("out"), 7, count=2)]
    assert paths == [
        ("out/00000-0.png", 7),
        ("out/00000-1.png", 8),
        ("out/00001-0.png", 9),
        ("out/00001-1.png", 10),
    ]


def test_objects_say_their_own_texts_and_seed(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "龙", "negative": "", "seed": 5}, {"prompt": "龙", "prompt_en": "ink"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = read_requests(
        file, Path("out"), 0, texts={"negative": "模糊", "prompt_en": "", "negative_en": "ugly"}
    )
    assert first == Request(Path("out/00000.png"), 5, "龙", "", "", "ugly")
    assert second == Request(Path("out/00001.png"), 1, "龙", "模糊", "ink", "ugly")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "has no prompt"),
        ('{"prompt": ""}', "has no prompt"),
        ('{"prompt": "a", "promt_en": ""}', "says 'promt_en'; allowed are prompt, negative"),
        ('{"prompt": "a", "seed": "1"}', "seed is '1'; give a whole number"),
        ('{"prompt": 3}', "prompt is 3; give a text"),
        ("", "holds no prompt"),
    ],
)
def test_other_lines_are_refused(tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        read_requests(tmp_path / "prompts.jsonl", tmp_path, 0)


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
    assert not missing(read_requests(folder / "prompts.txt", folder / "a", 0))
    assert "5 pictures in a" in capsys.readouterr().out


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
