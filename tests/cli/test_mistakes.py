"""Mistakes on the command line: one line that names the place and the remedy, in both languages, and nothing
is half-written."""

import re
from pathlib import Path

import pytest
import torch
from community_files import make_controlnet
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_branch, make_native, make_text_encoder, make_unet, make_vae

from bdm.cli import main
from bdm.cli.language import catalogue
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.pipeline import BridgePipeline
from bdm.text.vocabulary import clip_tokenizer

DRAW = ["infer", "--model", "model", "--steps", "1", "--out", "a.png"]
ONE = ["--image", "photo.png"]
ROWS = ["infer", "--model", "model", "--steps", "1", "--prompts"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a file of each kind."""
    place = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    unet = make_unet()
    parts = (make_vae(), make_text_encoder(), clip_tokenizer(), unet, DDIMScheduler(**SD15_SCHEDULE))
    BridgePipeline(*parts, make_branch(unet), make_native()).save_pretrained(place / "model")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{key}.lora_down.weight": torch.randn(2, TEXT_DIM), f"{key}.lora_up.weight": torch.randn(16, 2)}
    save_file(lora, place / "ink.safetensors")
    make_controlnet(unet).save_pretrained(place / "edges")
    Image.radial_gradient("L").resize((64, 64)).save(place / "photo.png")
    Image.new("L", (64, 64)).save(place / "black.png")
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    texts = {
        "rows.txt": "龙\n",
        "empty.txt": "\n\n",
        "table.csv": "seed,steps\n1,2\n",
        "broken.json": '[{"prompt": "龙"',
        "seven.json": '["a", "b", "c", "d", "e", "f", "g"]',
        "paths.yaml": "- one\n",
        "bad.txt": '--prompt 龙 --seed\n--seed 3\n--prompt "龙\n--prompt 龙 --sharpness 2\n'
        "--prompt 龙 --sampler_name Eular\n--prompt 龙 --seed x\n--prompt 龙 --steps 0\n",
        "bad.jsonl": '{"seed": 3}\nno JSON\n{"prompt": "龙", "seed": "x"}\n{"prompt": "龙", "count": 0}\n',
    }
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    return place


def drawing(*options, prompt="龙"):
    return [*DRAW, prompt, *options]


MISTAKES = [
    (drawing("--stepz", "3"), "unrecognized arguments: --stepz 3; did you mean --steps?"),
    (drawing("--steps", "x"), "argument --steps: invalid int value: 'x'"),
    (drawing("--steps", "0"), "--steps 0"),
    (drawing("--count", "0"), "each must be at least 1"),
    (drawing("--enlarge", "-2"), "--enlarge -2"),
    (drawing("--batch", "0"), "--batch 0"),
    (drawing("--seed", "-1"), "seed -1: give a whole number from 0"),
    (drawing("--seed", "9" * 30), "give a whole number from 0"),
    (drawing("--guidance", "nan"), "--guidance nan: give a finite number"),
    (drawing("--branch-scale", "inf"), "--branch-scale inf: give a finite number"),
    (drawing("--width", "30"), "width 30 is not a positive multiple of 8"),
    (drawing("--height", "0"), "height 0 is not a positive multiple of 8"),
    (drawing("--clip-skip", "0"), "clip_skip 0: give a whole number from 1"),
    (drawing("--clip-skip", "99", "--prompt-en", "a"), "clip_skip 99: this text encoder allows 1"),
    (drawing("--sampler", "Eular"), "unknown sampler 'Eular'"),
    (drawing("--sampler", "DPM fast"), "sampler DPM fast is none of diffusers'; the nearest"),
    (drawing("--sampler", "Euler", "--schedule", "Karas"), "unknown schedule 'Karas'"),
    (drawing("--schedule", "Karras"), "schedule 'Karras' is of a sampler; name the sampler too"),
    (drawing("--sampler", "DDIM", "--schedule", "Karras"), "sampler DDIM has no karras schedule"),
    (drawing("--device", "cuba"), "--device cuba cannot be used"),
    (drawing("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    (drawing("--lang", "tlh"), "argument --lang: 'tlh' is not spoken here; give en or zh"),
    (drawing("--out", "x.bmp"), "--out x.bmp: allowed endings are .png, .jpg and .webp"),
    (drawing("--out", "x" * 300 + ".png"), "File name too long; choose another file"),
    (drawing("--grid", "sheet.pdf"), "--grid sheet.pdf: allowed endings are"),
    (drawing("--names", "[date]"), "[date] would give every picture another name"),
    (drawing("--names", "[prmpt]"), "[prmpt] stands for nothing in a file's name"),
    (drawing("--names", "[seed].gif"), "[seed].gif: allowed endings are"),
    (drawing("--image", "none.png"), "none.png"),
    (drawing("--image", "broken.png"), "broken.png"),
    (drawing(*ONE, "--strength", "0"), "strength 0"),
    (drawing(*ONE, "--denoising-strength", "1.5"), "strength 1.5: give a number above 0, to 1"),
    (drawing("--mask", "black.png"), "--mask needs --image, the picture that it is of"),
    (drawing(*ONE, "--strength", "1", "--mask", "black.png"), "the mask is black, so nothing is drawn anew"),
    (drawing(*ONE, "--outpaint", "1:2"), "--outpaint 1:2: give four numbers of pixels"),
    (drawing(*ONE, "--outpaint", "0:0:0:0"), "no room is given to draw in"),
    (drawing(*ONE, "--outpaint", "0:0:8:8", "--width", "64"), "leave width and height out"),
    (drawing(*ONE, "--outpaint", "0:0:8:8", "--mask", "black.png"), "--mask and --outpaint are both given"),
    (drawing("--hires", "0.5"), "scale 0.5: give 1 or more"),
    (drawing("--hires", "--strength", "1", "--upscaler", "bigger"), "upscaler 'bigger'; known are"),
    (drawing(*ONE, "--hires"), "--hires draws its own first picture"),
    (drawing("--tiling", "sometimes"), "argument --tiling: invalid choice: 'sometimes'"),
    (drawing("--branch-schedule", "late"), "branch schedule 'late'"),
    (drawing("--branch-schedule", "0:2:1"), "0 to 2 is no part of the steps"),
    (drawing("--world", "2", "--prompt-en", "a"), "world 2: give a number from 0 (native) to 1 (English)"),
    (drawing("--world", "1", "--branch-schedule", "0:1:1"), "both world and branch_schedule are given"),
    (drawing("--guidance-interval", "half"), "--guidance-interval half: give two shares"),
    (drawing("--guidance-interval", "0.9:0.1"), "guidance interval 0.9 to 0.1"),
    (drawing("--deep-every", "0"), "deep_every 0: each must be a whole number"),
    (drawing("--english-guidance", "2", "--guidance", "1", "--prompt-en", "a"), "raise it above 1"),
    (drawing("--lora", "none.safetensors"), "none.safetensors: no such file; check the path"),
    (drawing("--lora", "photo.png"), "photo.png"),
    (drawing("--lora", "inc", "--models", "."), "no adapter is called inc; near it are ink"),
    (drawing("--lora", "ink.safetensors", "--models", "nowhere"), "--models nowhere: no such folder"),
    (drawing("--lora", "ink", "--models", "paths.yaml"), "paths.yaml names no folders"),
    (drawing("--checkpoint", "ink.safetensors"), "allowed here: checkpoint for SD1.5"),
    (drawing("--embedding", "ink.safetensors"), "allowed here: embedding for SD1.5"),
    (drawing("--controlnet", "edges"), "1 --controlnet and 0 --control-image; give one image for each"),
    (drawing("--controlnet", "edges", "--control-image", "photo.png:1:0"), "2 numbers behind the file"),
    (drawing("--controlnet", "edges", "--control-image", "rows.txt"), "rows.txt is not a picture"),
    (drawing("--wildcards", "nowhere"), "nowhere: no such folder; give one with wildcards' .txt files"),
    (drawing(prompt="龙 <lora:none:1>"), "the prompt names the adapter 'none'"),
    (drawing("--guidance", "1", prompt="龙 AND 月饼"), "give a guidance_scale above 1"),
    (drawing("--prompt-en", "a AND b AND c", prompt="龙 AND 月饼"), "AND joins 2 native prompts and 3 "),
    (drawing("--attention", "--batch", "2"), "--attention records one picture at a time"),
    (drawing("--attention-words", "绿色"), "the word '绿色' is in no prompt that is said"),
    (drawing("--attention", prompt="龙 AND 月饼"), "attention is recorded of prompts that say the same"),
    (drawing(prompt="rows.txt"), "the prompt rows.txt is a file; give it with --prompts"),
    (drawing("--prompts", "rows.txt"), "give prompts or --prompts FILE, not both"),
    (DRAW, "give prompts or --prompts FILE, such as"),
    ([*ROWS, "none.txt"], "none.txt cannot be read (No such file or directory); give a text file"),
    ([*ROWS, "empty.txt"], "empty.txt holds no prompt; give one in each line"),
    ([*ROWS, "table.csv"], "table.csv: its first line names 'seed', 'steps', none of which is prompt"),
    ([*ROWS, "broken.json"], "broken.json is not JSON"),
    ([*ROWS, "seven.json"], "seven.json is one list of 7 texts"),
    ([*ROWS, "rows.txt", "--out", "photo.png"], "--out photo.png is a file"),
    ([*ROWS, "rows.txt", "--stages"], "--stages times one drawing"),
    ([*DRAW, "--from", "photo.png"], "photo.png carries no bdm JSON, so it cannot be drawn again"),
    ([*DRAW, "--from", "none.png"], "none.png cannot be read as a picture"),
    ([*ROWS, "rows.txt", "--from", "photo.png"], "--from and --prompts are both given"),
    ([*DRAW, "龙", "月饼", "--from", "photo.png"], "--from and 2 prompts are given"),
    (["sheet", "龙", "--model", "model"], "a sheet needs --x, such as --x 'Steps: 10,20'"),
    (["sheet", "龙", "--x", "Stepz: 1"], "axis 'Stepz: 1'; give NAME: VALUES"),
    (["sheet", "龙", "--x", "Steps:"], "axis Steps has no values; give some, such as Steps: 1,2"),
    (["sheet", "龙", "--x", "Steps: few"], "axis Steps: 'few'; give whole numbers, or a range"),
    (["sheet", "龙", "--model", "model", "--x", "Prompt S/R: 猫,狗"], "no prompt holds '猫'"),
    (["sheet", "龙", "--model", "model", "--x", "Size: big"], "axis Size: 'big'; give WIDTHxHEIGHT"),
    (["sheet", "龙", "--x", "Var. seed: 1"], "axis Var. seed is not drawn here; give one of Seed"),
    (["sheet", "龙", "--x", "Prompt order: a,b,c,d,e,f,g"], "7 words have more than 1000 orders; give fewer"),
    (drawing("--branch", "nowhere"), "nowhere"),
    (drawing("--beside", "model"), "1 branches beside the model's own and 0 --beside-prompt"),
    (["compare", "龙", "--model", "model"], "there is no English text to compare with"),
    (["info", "photo.png"], "photo.png says nothing of how it was made"),
    (["info", "rows.txt"], "rows.txt cannot be read as a picture"),
    (["models", "nowhere"], "--models nowhere: no such folder"),
    (["models"], "no folder of models is given; give one, or name some in BDM_MODELS"),
    (["inspect", "none.safetensors"], "none.safetensors"),
    (["convert", "ink.safetensors", "b", "--layout", "original"], "a adapter has no original layout"),
    (["draw", "龙"], "argument COMMAND: invalid choice: 'draw'"),
    ([], "the following arguments are required: COMMAND"),
]  # fmt: skip


def ended(arguments, capsys):
    """The exit status of a command, and the last line that it writes."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    # A progress bar that was begun stands in front, or on lines of its own.
    return status, lines[-1] if lines else "", [line for line in lines if line.startswith(("error", "Trace"))]


def listed(place):
    return {path.relative_to(place): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line_in_both_languages(place, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = listed(place)
    status, line, all_lines = ended(arguments, capsys)
    assert (status, len(all_lines)) == (2, 1), line
    assert line.startswith("error: ")
    assert message in line
    assert listed(place) == before, "nothing half-written"
    assert is_chinese(line), catalogue("zh").told(line)


def is_chinese(line):
    """Whether all of a message but names and values is told in Chinese."""
    told = catalogue("zh").told(line) or ""
    plain = re.sub(r"'[^']*'|\([^()]*\)|（[^（）]*）", "", told)
    return re.search("[\u4e00-\u9fff]", told) and not re.search(r"\b[a-z]{2,} [a-z]{2,} [a-z]{2,}\b", plain)


def test_there_are_sixty():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl"])
def test_bad_rows_are_named_in_both_languages_and_the_others_are_drawn(place, name, capsys, monkeypatch):
    monkeypatch.chdir(place)
    rows = Path(name).read_text(encoding="utf-8") + ('{"prompt": "龙"}\n' if "json" in name else "龙\n")
    Path("rows-" + name).write_text(rows, encoding="utf-8")
    status, line, _ = ended([*ROWS, "rows-" + name, "--out", f"drawn-{name}"], capsys)
    bad = len(rows.splitlines()) - 1
    assert status == 3
    assert f"{bad} gave no picture and 1 did" in line
    assert len(list(Path(f"drawn-{name}").iterdir())) == 1
    assert is_chinese(line), catalogue("zh").told(line)
    told = catalogue("zh").told(line)
    assert all(f"第 {number} 行" in told for number in range(1, bad + 1)), told


def test_a_command_speaks_chinese(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert ended(["--lang", "zh", *drawing("--steps", "0")], capsys)[1] == (
        "错误：--steps 0, --count 1, --batch 1：都不得小于 1"
    )
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert ended(drawing("--stepz", "3"), capsys)[:2] == (
        2, "错误：无法识别的参数：--stepz 3；想写的是不是 --steps？"
    )  # fmt: skip
    assert ended(drawing("--lang", "en", "--out", "x.bmp"), capsys)[1].startswith("error: --out x.bmp")
    assert main([*ROWS, "rows.txt", "--out", "drawn"]) == 0
    assert capsys.readouterr().out == "drawn 中共 1 张图片：新画 1 张\n"
