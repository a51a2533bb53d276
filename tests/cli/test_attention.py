"""``--attention``: a strip beside each picture, which is what it is without."""

from pathlib import Path

import pytest
from PIL import Image

from bdm.cli import main
from bdm.drawing.picture_reading import picture_request

PLAIN = ["infer", "红灯笼，蓝色背景", "--model", "model", "--steps", "2", "--prompt-en", "red"]


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def width(path):
    with Image.open(path) as picture:
        return picture.width


def test_strips_lie_beside_their_pictures(folder, capsys):
    assert main([*PLAIN, "--out", "a.png"]) == 0
    alone = Path("a.png").read_bytes()
    assert main([*PLAIN, "--out", "a.png", "--attention"]) == 0
    assert Path("a.png").read_bytes() == alone
    assert capsys.readouterr().out.splitlines()[-3:] == ["a.png", "a-attention.png", "1 redrawn"]
    strip = Path("a-attention.png")
    assert width(strip) == 4 * (128 + 4) + 4, "the picture, two native parts, one English word"
    assert picture_request(strip) == picture_request(Path("a.png"))
    # What is there is kept, and drawn again where other words are asked for.
    assert main([*PLAIN, "--out", "a.png", "--attention"]) == 0
    assert "1 kept" in capsys.readouterr().out
    assert main([*PLAIN, "--out", "a.png", "--attention-words", "蓝色，red"]) == 0
    assert width(strip) == 3 * (128 + 4) + 4
    assert Path("a.png").read_bytes() == alone


def test_a_row_without_the_word_ends_none_of_the_others(folder, capsys):
    Path("rows.txt").write_text("红灯笼\n月饼\n红灯笼，蓝色\n", encoding="utf-8")
    arguments = ["infer", "--prompts", "rows.txt", "--model", "model", "--steps", "1"]
    assert main([*arguments, "--attention-words", "红灯笼"]) == 3
    said = capsys.readouterr()
    assert "line 2 (00001.png) cannot be drawn: the word '红灯笼' is in no prompt" in said.err
    names = ["00000-attention.png", "00000.png", "00002-attention.png", "00002.png"]
    assert sorted(path.name for path in Path("pictures").iterdir()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "--batch", "2"], "--attention records one picture at a time; leave --batch out"),
        (["--attention-words", "，"], "--attention-words names no word"),
        (["--attention-words", "绿色"], "the word '绿色' is in no prompt"),
    ],
)
def test_mistakes(folder, arguments, message, capsys):
    assert main([*PLAIN, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("*.png"))
