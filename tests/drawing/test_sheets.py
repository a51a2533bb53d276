"""Sheets: each cell is the picture that its request alone draws; axes by A1111's names."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_branch

from bdm import Mode, Request
from bdm.cli import main
from bdm.cli.language import catalogue, speak
from bdm.cli.sheets import _axis, _called
from bdm.drawing.axes import AXES, NOT_HERE, read_axis
from bdm.drawing.library import Library
from bdm.drawing.picture_reading import picture_texts
from bdm.drawing.sheets import axis_sheets, compared
from bdm.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("Steps: 10,20", "Steps", ("10", "20")),
        ("steps：1-5", "Steps", ("1", "2", "3", "4", "5")),
        ("CFG Scale: 1-5 (+2)", "CFG Scale", ("1", "3", "5")),
        ("cfg_scale: 1-2 [3], 7.5", "CFG Scale", ("1", "1.5", "2", "7.5")),
        ("Seed: 1-9 [3]", "Seed", ("1", "5", "9")),
        ('Prompt S/R: red, "a, b", ', "Prompt S/R", ("red", "a, b", "")),
        ("Sampler: Euler a, DPM++ 2M Karras", "Sampler", ("Euler a", "DPM++ 2M Karras")),
        ("Branch scale: 0,0.5", "Branch scale", ("0", "0.5")),
        ('English prompt: ,"ink, style"', "English prompt", ("", "ink, style")),
        ('Prompt order: red, "a, b"', "Prompt order", ('red,"a, b"', '"a, b",red')),
        ("Hires steps: 2-4 (+2)", "Hires steps", ("2", "4")),
        ("Branch: runs/a/model, none", "Branch", ("runs/a/model", "none")),
        ("步数：1-3", "Steps", ("1", "2", "3")),
    ],
)
def test_axes_as_people_write_them(text, name, values):
    axis = _axis(text)
    assert axis is not None
    assert (axis.name, axis.values) == (name, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Stepps: 1", "give NAME: VALUES, with one of Seed, Steps"),
        ("Steps", "give NAME: VALUES"),
        ("Steps:", "has no values"),
        ("Steps: many", "'many'; give whole numbers"),
        ("Steps: 5-1", "'5-1'; give whole numbers"),
        ("CFG Scale: 1-2 (+0)", "give numbers"),
        ("Face restore: CodeFormer", "is not drawn here; give one of Seed"),
        ("Var. seed: 1", "is not drawn here"),
        ("Prompt order: a, b, c, d, e, f, g", "7 words have more than 1000 orders"),
    ],
)
def test_other_axes_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        read_axis(text)
    assert message in str(caught.value)


def test_values_change_what_they_name():
    base, library = Request(prompt="红灯笼", sampler="Euler", mode=Mode("hires")), Library()

    def applied(text):
        axis = read_axis(text)
        return [axis.apply(base, value, library) for value in axis.values]

    assert [r.steps for r in applied("Steps: 3,4")] == [3, 4]
    assert [r.prompt for r in applied("Prompt S/R: 红,绿,蓝")] == ["红灯笼", "绿灯笼", "蓝灯笼"]
    assert [(r.sampler, r.schedule) for r in applied("Sampler: dpmpp_2m_karras")] == [("DPM++ 2M", "Karras")]
    assert [(r.sampler, r.schedule) for r in applied("Schedule type: Karras")] == [("Euler", "Karras")]
    assert [(r.width, r.height) for r in applied("Size: 64x72")] == [(64, 72)]
    assert [dict(r.mode.settings) for r in applied("Denoising: 0.5")] == [{"strength": 0.5}]
    assert [r.prompt_en for r in applied('English prompt: ,"a, b"')] == ["", "a, b"]
    assert [dict(r.mode.settings) for r in applied("Hires steps: 3")] == [{"second_steps": 3}]
    assert [dict(r.mode.settings) for r in applied("Hires upscaler: Latent, Lanczos")] == [
        {"upscaler": "latent"},
        {"upscaler": "lanczos"},
    ]
    assert [r.prompt for r in applied("Prompt order: 红, 灯笼")] == ["红灯笼", "灯笼红"]
    for text in ("Prompt S/R: 黄,绿", "Size: 64", "Steps: 0", "Prompt order: 红, 黄"):
        with pytest.raises(UserError):
            applied(text)


def test_every_cell_has_its_place():
    asked = []

    def draw(requests):
        asked.extend(requests)
        return [Image.new("RGB", (128, 128), (r.steps, int(r.guidance), r.seed)) for r in requests]

    x, y, z = read_axis("Steps: 10,20,30"), read_axis("CFG Scale: 1,2"), read_axis("Seed: 7,8")
    first, second = axis_sheets(Request(prompt="龙", guidance=0.0), x, y, z, Library(), draw)
    assert len(asked) == 12
    assert first.size == second.size
    assert first.getpixel((20, 20)) == (10, 1, 7)
    assert second.getpixel((first.width - 20, 20)) == (30, 1, 8)
    assert first.getpixel((20, first.height - 80))[:2] == (10, 2)
    strip = compared(Request(prompt="龙", prompt_en="dragon", guidance=0.0), draw)
    assert strip.width == 3 * 132 + 4
    native, english, both = asked[-3:]
    assert (native.prompt, native.prompt_en, native.branch_scale) == ("龙", "", 1)
    assert (english.prompt, english.prompt_en, english.branch_scale) == ("", "dragon", 0)
    assert both == Request(prompt="龙", prompt_en="dragon", guidance=0.0)
    with pytest.raises(UserError, match="more than 1000"):
        axis_sheets(Request(), read_axis("Seed: 1-900"), read_axis("Steps: 1,2"), None, Library(), draw)
    with pytest.raises(UserError, match="no English text"):
        compared(Request(prompt="龙"), draw)


def test_commands_write_sheets(pipe, tmp_path, monkeypatch, capsys):
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    plain = ["--model", "model", "--steps", "1", "--seed", "3"]
    assert (
        main(["sheet", "龙", *plain, "--x", "Steps: 1,2", "--y", "Branch scale: 0,1", "--out", "s.png"]) == 0
    )
    assert main(["infer", "龙", *plain, "--count", "2", "--out", "a.png", "--grid", "g.png"]) == 0
    assert main(["compare", "龙", *plain, "--prompt-en", "dragon", "--out", "c.png"]) == 0
    Path("table.tsv").write_text("龙\tdragon\n", encoding="utf-8")
    assert main(["compare", "龙", *plain, "--translate", "table.tsv", "--out", "t.png"]) == 0
    assert Path("t.png").read_bytes() == Path("c.png").read_bytes()
    one, grid = Image.open("a-0.png"), Image.open("g.png")
    large = one.resize((128, 128), Image.Resampling.NEAREST)
    assert grid.crop((4, 4, 132, 132)).tobytes() == large.tobytes()
    sheet, strip = Image.open("s.png"), Image.open("c.png")
    assert strip.crop((4, 4, 132, 132)).tobytes() == large.tobytes()
    top = (sheet.height - 4) // 2 + 4
    assert sheet.crop((4, top, 132, top + 128)).tobytes() == large.tobytes()
    for arguments, message in (
        (["sheet", "龙"], "a sheet needs --x"),
        (["sheet", "龙", "--x", "Steps: 1", "--out", "a.bmp"], "allowed endings"),
        (["compare", "龙", *plain], "no English text"),
        (["compare", "龙", *plain, "--prompt-en", "a", "--translate", "table.tsv"], "are both given"),
        (["compare", "龙", *plain, "--translate", "none.tsv"], "none.tsv: no such file or folder"),
        (["compare", "--prompts", "a.txt"], "give one prompt"),
        (["infer", "龙", "--grid", "g.bmp"], "allowed endings"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path("compare.png").exists()


def test_axes_have_names_in_chinese():
    speak("zh")
    try:
        named = {title: _called(title) for title in AXES}
        axis = read_axis("Steps: 1,2")
        assert axis.label("1", _called) == "步数: 1"
    finally:
        speak("en")
    assert named == {title: (catalogue("zh").told(f"axis: {title}") or "") for title in AXES}
    assert len(set(named.values())) == len(AXES)
    assert all(title == "VAE" or name != title for title, name in named.items())
    assert axis.label("1", _called) == "Steps: 1"
    assert not set(AXES) & set(NOT_HERE)
    assert _axis("Nothing") is None


def test_an_axis_of_branches(pipe, tmp_path, monkeypatch, capsys):
    """Each is in the picture that it drew, which is drawn again when its folder has another name."""
    pipe.save_pretrained(tmp_path / "model")
    torch.manual_seed(11)
    make_branch(pipe.unet).save_pretrained(tmp_path / "trained")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    shutil.copytree(tmp_path / "trained", tmp_path / "other/branch", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    plain = ["龙", "--model", "model", "--steps", "1", "--seed", "3"]
    command = ["sheet", *plain, "--lang", "zh", "--x", "分支: none, trained, other", "--out", "s.png"]
    assert main(command) == 0, capsys.readouterr().err
    speak("en")
    sheet = Image.open("s.png")
    own, trained, other = (sheet.crop((4 + 132 * i, 4, 132 * (i + 1), 132)).tobytes() for i in range(3))
    assert trained == other != own

    assert main(["infer", *plain, "--branch", "trained", "--out", "a.png"]) == 0
    assert "Branch: trained" in picture_texts(Path("a.png"))[0]
    shutil.move("trained", "renamed")
    shutil.rmtree("other")
    assert main(["infer", "--from", "a.png", "--models", ".", "--out", "b.png"]) == 0, capsys.readouterr().err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    shutil.rmtree("renamed")
    capsys.readouterr()
    assert main(["infer", "--from", "a.png", "--models", ".", "--out", "c.png"]) == 2
    assert "branch trained (hash " in capsys.readouterr().err
