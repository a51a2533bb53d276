"""``bdm inspect`` of files that others made, and output that nobody reads any more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bdm.cli import main

ROOT = Path(__file__).parents[2]
ACTING = "\x1b[31m\x07\r\n\u202e\x9b"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lora(path, metadata=None, module="lora_unet_mid_block_attentions_0_proj_in"):
    save_file(
        {f"{module}.lora_down.weight": torch.randn(2, 32), f"{module}.lora_up.weight": torch.randn(32, 2)},
        path,
        metadata or {},
    )
    return str(path)


def shown(printed):
    """Lines without what ends them, each of which must do nothing to a terminal."""
    lines = printed.split("\n")
    assert all(line.isprintable() for line in lines), lines
    return lines


def test_texts_of_a_file_do_not_act_on_the_terminal(here, capsys):
    texts = {
        "modelspec.title": f"Ink{ACTING}",
        "modelspec.trigger_phrase": f"ink style{ACTING}",
        "ss_base_model_version": ACTING,
        "ss_network_dim": f"2{ACTING}",
    }
    assert main(["inspect", lora(here / f"ink{ACTING}.safetensors", texts)]) == 0
    printed = capsys.readouterr()
    lines = shown(printed.out)
    assert any("Ink" in line and "\\x1b[31m" in line for line in lines)
    assert any("ink style" in line for line in lines)
    assert printed.err == ""


def test_an_embedding_of_acting_words(here, capsys):
    torch.save({f"<cat{ACTING}>": torch.randn(2, 768)}, here / "cat.pt")
    assert main(["inspect", "cat.pt"]) == 0
    assert any("vectors" in line for line in shown(capsys.readouterr().out))


def test_keys_of_acting_names_are_refused_on_one_line(here, capsys):
    save_file({f"model.diffusion_model.{ACTING}.weight": torch.zeros(2)}, here / "odd.safetensors")
    main(["inspect", "odd.safetensors"])
    main(["convert", "odd.safetensors", "x.safetensors", "--layout", "diffusers"])
    printed = capsys.readouterr()
    shown(printed.out)
    assert len(shown(printed.err)) <= 3


def test_several_files_one_of_which_is_bad(here, capsys):
    Image.new("RGB", (8, 8)).save("picture.png")
    (here / "torn.safetensors").write_bytes((here / lora(here / "ink.safetensors")).read_bytes()[:50])
    lora(here / "oil.safetensors", {"modelspec.title": "Oil"})
    names = ["ink.safetensors", "picture.png", "none.ckpt", "torn.safetensors", "x" * 300, "oil.safetensors"]
    assert main(["inspect", *names]) == 2
    printed = capsys.readouterr()
    lines = shown(printed.out)
    assert [line for line in lines if line and not line.startswith(" ")] == names
    assert sum("LoRA" in line for line in lines) == 2
    assert any("Oil" in line for line in lines)
    problems = [line for line in lines if line.startswith("  problem")]
    assert len(problems) == 4
    assert "a picture (PNG)" in problems[0]
    assert "no such weight file" in problems[1]
    assert "not a whole safetensors file" in problems[2]
    (error,) = [line for line in shown(printed.err) if line]
    assert error.startswith("error: 4 of 6 cannot be read: ")


def test_one_bad_file_is_one_line(here, capsys):
    Image.new("RGB", (8, 8)).save("picture.png")
    for name, message in {
        "picture.png": "a picture (PNG)", "none.safetensors": "no such weight file", "a\0b": "code 0",
        "y" * 5000: "no such weight file", "/".join("ab" * 3000): "no such weight file",
        ".": "no model folder",
    }.items():  # fmt: skip
        assert main(["inspect", name]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = [line for line in shown(printed.err) if line]
        assert message in line
        assert len(line) < 700


def test_very_long_names_and_texts_are_cut(here, capsys):
    long = "龙" * 50_000
    path = lora(here / "ink.safetensors", {"modelspec.title": long, "modelspec.trigger_phrase": long})
    assert main(["inspect", path]) == 0
    assert max(map(len, shown(capsys.readouterr().out))) < 700
    save_file({f"unet.{long}.lora_up.weight": torch.zeros(2, 2)}, here / "odd.safetensors")
    main(["inspect", "odd.safetensors"])
    main(["convert", "odd.safetensors", "x.safetensors", "--layout", "kohya"])
    printed = capsys.readouterr()
    assert max(map(len, shown(printed.out) + shown(printed.err))) < 1500


def test_a_folder_of_acting_texts(here, capsys):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps({"_class_name": f"Unet{ACTING}" * 1000}))
    main(["inspect", "model"])
    printed = capsys.readouterr()
    assert max(map(len, shown(printed.out) + shown(printed.err))) < 700


# Output that nobody reads


def run_with(command, stdout, stderr=subprocess.PIPE):
    code = f"from bdm.cli import console; console({command!r})"
    # Buffered, as where output goes into a pipe.
    program = [sys.executable, "-c", code]
    return subprocess.run(
        program, stdout=stdout, stderr=stderr, text=True, check=False, cwd=ROOT, timeout=100
    )


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("command", ["--help", "inspect --help", "inspect FILE", "inspect" + " FILE" * 300])
def test_a_closed_pipe_ends_a_command_quietly(tmp_path, command):
    path = lora(tmp_path / "ink.safetensors")
    writing = closed_pipe()
    ended = run_with([word.replace("FILE", path) for word in command.split()], writing)
    os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == (0 if "--help" in command else 141)


def test_a_check_whose_first_line_is_read(tmp_path):
    """As ``bdm train --check | head -1``."""
    code = "from bdm.cli import console; console(['train', 'configs/quickstart.yaml', '--check'])"
    command = f'{sys.executable} -c "{code}" | head -1'
    ended = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False
    )
    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1


def test_where_both_outputs_are_closed():
    writing = closed_pipe()
    ended = run_with(["inspect", "none.ckpt"], writing, writing)
    os.close(writing)
    assert ended.returncode in (2, 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    path = lora(tmp_path / "ink.safetensors")
    with open("/dev/full", "w") as full:
        ended = run_with(["inspect", path], full)
    assert ended.returncode == 2
    assert ended.stderr == "error: No space left on device\n"
