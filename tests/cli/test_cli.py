import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from community_files import make_controlnet, write_original
from PIL import Image
from safetensors.torch import save_file
from tiny import TEXT_DIM, make_text_encoder, make_unet, make_vae

from bdm.cli import main
from bdm.cli.draw_plugins import split_numbers
from bdm.drawing.complete import DEFAULT_MODEL, default_guidance
from bdm.drawing.grid import labelled_grid
from bdm.errors import UserError

ROOT = Path(__file__).parents[2]
needs_weights = pytest.mark.skipif(
    not (DEFAULT_MODEL / "branch" / "config.json").exists(), reason="assets/emoji has no branch"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "龙", "--model", "/no/such/model"], "no such folder"),
        (["infer", "龙", "--sampler", "Eular"], "unknown sampler 'Eular'"),
        (["infer", "龙", "--out", "x.bmp"], "allowed endings"),
        (["infer", "龙", "--steps", "0"], "must be at least 1"),
        (["infer"], "give prompts or --prompts FILE"),
        (["infer", "龙", "--prompts", "x.txt"], "not both"),
        (["infer", "--prompts", "/no/x.txt"], "give a text file with a prompt in each line, or one of .json"),
        (
            ["infer", "--prompts", f"{ROOT}/pyproject.toml", "--out", f"{ROOT}/README.md"],
            "README.md is a file",
        ),
        (["infer", "龙", "--guidance-interval", "half"], "--guidance-interval half: give two shares"),
        (["infer", "龙", "--guidance-interval", "0.9:0.1"], "guidance interval 0.9 to 0.1"),
        (["infer", "龙", "--deep-every", "0"], "deep_every 0"),
        (["infer", "龙", "--device", "cuba"], "--device cuba cannot be used"),
        (["train", "configs/none.yaml"], "No such file"),
        (["train", str(ROOT / "configs/quickstart.yaml"), "optimiser.steps=3"], "optimiser: unknown key"),
        (
            ["train", str(ROOT / "configs/sd15_chinese_clip.yaml"), "data.urls=/no/data/*.tar"],
            "matches no shard",
        ),
        (["train", str(ROOT / "configs/quickstart.yaml"), "trackers=[swanlab]"], "pip install swanlab"),
        (
            ["train", str(ROOT / "configs/quickstart.yaml"), "--dry-run", "recipe.backbone=/no/model"],
            "/no/model",
        ),
        (
            ["train", str(ROOT / "configs/emoji/backbone.yaml")],
            "runs/emoji/autoencoder/model: no such folder",
        ),
        (
            ["train", str(ROOT / "configs/emoji/backbone.yaml"), "recipe.unet.block_out_chanels=[8]"],
            "nearest are block_out_channels",
        ),
        (
            ["train", str(ROOT / "configs/emoji/english_clip.yaml"), "recipe.text.hiden_size=8"],
            "nearest are hidden_size",
        ),
        (
            ["train", str(ROOT / "configs/emoji/chinese_clip.yaml"), "recipe.vision.patchsize=8"],
            "nearest are patch_size",
        ),
        (
            ["train", str(ROOT / "configs/emoji/autoencoder.yaml"), "recipe.model.latent_chanels=8"],
            "nearest are latent_channels",
        ),
        (
            ["train", str(ROOT / "configs/emoji/english_clip.yaml"), "data.limit=1", "data.colours=[white]"],
            "no validation examples",
        ),
        (
            ["evaluate", str(ROOT / "configs/emoji/evaluate.yaml"), "judge=/no/judge"],
            "is not a judge's folder",
        ),
        (
            ["evaluate", str(ROOT / "configs/emoji/evaluate.yaml"), f"judge={ROOT}/assets/emoji/vae"],
            "is not a judge's folder",
        ),
        (
            ["evaluate", str(ROOT / "configs/emoji/evaluate.yaml"), f"out={ROOT}/README.md/x"],
            "README.md is a file; choose another",
        ),
        (
            ["evaluate", str(ROOT / "configs/emoji/plugins.yaml"), f"out={ROOT}/README.md/x"],
            "README.md is a file; choose another",
        ),
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


def test_guidance_of_the_shipped_model_does_not_hang_on_how_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "link").symlink_to(DEFAULT_MODEL)
    paths = (
        str(DEFAULT_MODEL),
        "assets/emoji",
        "./assets/emoji/",
        str(tmp_path / "link"),
        "assets",
        "owner/model",
    )
    assert [default_guidance(path) for path in paths] == [2.0, 2.0, 2.0, 2.0, 7.5, 7.5]


def test_check_prints_the_resolved_configuration(capsys):
    assert (
        main(["train", str(ROOT / "configs/sd15_chinese_clip.yaml"), "--check", "optimizer.steps=2000"]) == 0
    )
    printed = capsys.readouterr().out
    assert "steps: 2000" in printed
    assert "batch_size: 3200" in printed


def test_dry_run_goes_through_everything_and_keeps_nothing(capsys, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = (
        "recipe.model={block_out_channels: [8, 8], norm_num_groups: 4, down_block_types: [DownEncoderBlock2D,"
        " DownEncoderBlock2D], "
    )
    small += "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]}"
    arguments = [
        "data.limit=2",
        "optimizer.batch_size=2",
        "out=runs/x",
        "optimizer.steps=900",
        "threads=1",
        small,
    ]
    assert main(["train", str(ROOT / "configs/emoji/autoencoder.yaml"), "--dry-run", *arguments]) == 0
    for stage in ("models and data", "validation", "grid", "state"):
        assert f"{stage}: " in caplog.text
    assert "the step of 2 samples took" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help_needs_no_heavy_import():
    code = "import sys, bdm.cli; bdm.cli.build_parser().format_help(); sys.exit('torch' in sys.modules)"
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
    again = np.asarray(Image.open(tmp_path / "lantern-0.png")).astype(int)
    assert abs(again - np.asarray(picture)).max() <= 1, "picture i uses seed + i"
    assert main(["infer", "龙", "--height", "30", "--out", str(out)]) == 2
    assert "height 30" in capsys.readouterr().err
    assert main([*arguments, "--stages", "--redraw"]) == 0
    total, *stages = [
        float(number) for number in re.findall(r"([0-9.]+) s", capsys.readouterr().err.splitlines()[-1])
    ]
    assert len(stages) == 3
    assert sum(stages) == pytest.approx(total, abs=0.05)


def test_labels_wrap_and_every_picture_has_its_place():
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    sheet = labelled_grid(pictures, ["红灯笼，蓝色背景", "a long English label", ""], columns=2, scale=4)
    assert sheet.getpixel((10, 10)) == (255, 0, 0)
    assert sheet.getpixel((80, 10)) == (0, 128, 0)
    assert sheet.width == 2 * 64 + 3 * 4


@pytest.mark.parametrize(
    ("text", "counts", "expected"),
    [
        ("a.safetensors", (0, 1, 2), ("a.safetensors", [])),
        ("a.safetensors:0.8", (0, 1, 2), ("a.safetensors", [0.8])),
        ("C:/x/a.safetensors:-0.8:.5", (0, 1, 2), ("C:/x/a.safetensors", [-0.8, 0.5])),
        ("dir:1/a.png:0.9:0:0.6", (0, 1, 3), ("dir:1/a.png", [0.9, 0.0, 0.6])),
    ],
)
def test_numbers_behind_a_file(text, counts, expected):
    assert split_numbers(text, "--lora", counts) == expected


def test_wrong_count_of_numbers_is_an_error():
    with pytest.raises(UserError, match="allowed are 0 or 1 or 3"):
        split_numbers("a.png:0.9:0.1", "--control-image", (0, 1, 3))


@pytest.fixture
def model(pipe, tmp_path):
    """A tiny pipeline folder and plug-ins made for it."""
    pipe.save_pretrained(tmp_path / "model")
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {
        f"{attention}.lora_down.weight": torch.randn(2, TEXT_DIM),
        f"{attention}.lora_up.weight": torch.randn(16, 2),
    }
    save_file(factors, tmp_path / "ink.safetensors", {"ss_network_dim": "2"})
    save_file({"emb_params": torch.randn(2, TEXT_DIM)}, tmp_path / "calm.safetensors")
    make_controlnet(pipe.unet).save_pretrained(tmp_path / "edges")
    Image.radial_gradient("L").resize((64, 64)).save(tmp_path / "photo.png")
    return tmp_path


def test_infer_with_plugins_and_their_names_in_the_picture(model, capsys, monkeypatch):
    monkeypatch.chdir(model)
    plain = ["infer", "龙", "--model", "model", "--steps", "2", "--out", "a.png"]
    assert main(plain) == 0
    plugged = [
        *plain[:-1],
        "b.png",
        "--lora",
        "ink.safetensors:0.5:0.1",
        "--embedding",
        "calm.safetensors",
        "--prompt-en",
        "calm",
        "--controlnet",
        "edges",
        "--control-image",
        "photo.png:0.8:0:1",
        "--annotator",
        "canny",
    ]
    assert main(plugged) == 0, capsys.readouterr().err
    before, after = Image.open("a.png"), Image.open("b.png")
    assert before.tobytes() != after.tobytes()
    named = {plugin["kind"]: plugin for plugin in json.loads(after.text["bdm"])["plugins"]}
    assert set(named) == {"adapter", "embedding", "controlnet"}
    assert (named["adapter"]["strength"], named["adapter"]["text_strength"]) == (0.5, 0.1)
    assert f'Lora hashes: "ink: {named["adapter"]["file"]["hash"]}"' in after.text["parameters"]


def test_checkpoint_and_vae_from_the_command_line(model, monkeypatch):
    """A whole checkpoint given as --vae brings its VAE and nothing else."""
    monkeypatch.chdir(model)
    other = type("Other", (), {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()})()
    write_original(other, "style.safetensors")
    save_file({"emb_params": torch.randn(1, TEXT_DIM)}, "ink.pt")

    def drawn(*arguments):
        out = ["--model", "model", "--steps", "2", "--out", "a.png", "--prompt-en", "ink"]
        assert main(["infer", "龙", *out, *arguments]) == 0
        picture = Image.open("a.png")
        plugins = json.loads(picture.text["bdm"]).get("plugins", [])
        return np.asarray(picture).astype(int), {p["kind"]: p["name"] for p in plugins}

    plain, _ = drawn()
    whole, attached = drawn("--checkpoint", "style.safetensors")
    assert attached == {"checkpoint": "style"}
    vae, attached = drawn("--vae", "style.safetensors")
    assert attached == {"vae": "style"}
    pairs = ((plain, whole), (plain, vae), (whole, vae))
    assert all(abs(one - other).max() > 1 for one, other in pairs)
    both, attached = drawn("--vae", "style.safetensors", "--checkpoint", "style.safetensors")
    assert attached == {"checkpoint": "style", "vae": "style-2"}
    assert abs(both - whole).max() <= 1
    # The LoRA gives way: an embedding's name is the word it is called by.
    _, attached = drawn("--lora", "ink.safetensors", "--embedding", "ink.pt")
    assert attached == {"embedding": "ink", "adapter": "ink-2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "edges"], "allowed here: adapter for SD1.5"),
        (["--embedding", "ink.safetensors"], "allowed here: embedding"),
        (["--vae", "ink.safetensors"], "allowed here: vae or checkpoint"),
        (["--checkpoint", "ink.safetensors"], "allowed here: checkpoint"),
        (["--controlnet", "ink.safetensors", "--control-image", "photo.png"], "allowed here: controlnet"),
        (["--lora", "calm.safetensors:1:1:1"], "no such folder"),
        (["--lora", "none.safetensors"], "no such file"),
        (["--checkpoint", "photo.png"], "photo.png is a picture (PNG)"),
        (["--controlnet", "edges"], "give one image for each"),
        (["--controlnet", "edges", "--control-image", "calm.safetensors"], "not a picture"),
        (["--controlnet", "edges", "--control-image", "photo.png", "--annotator", "hed"], "controlnet_aux"),
        (["--controlnet", "edges", "--control-image", "photo.png", "--height", "32"], "resize one of them"),
        (["--clip-skip", "9"], "clip_skip 9"),
    ],
)
def test_mistakes_with_plugins(model, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(model)
    assert main(["infer", "龙", "--model", "model", "--steps", "1", "--out", "a.png", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert not Path("a.png").exists()


def test_inspect_and_convert(model, capsys, monkeypatch):
    monkeypatch.chdir(model)
    assert main(["inspect", "ink.safetensors", "edges", "calm.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "LoRA" in printed
    assert "controlnet (diffusers layout)" in printed
    assert "vectors" in printed
    assert main(["convert", "edges", "edges.safetensors", "--layout", "original", "--dtype", "fp16"]) == 0
    assert main(["inspect", "edges.safetensors"]) == 0
    assert "original" in capsys.readouterr().out
    assert main(["convert", "edges", "x.safetensors", "--layout", "kohya"]) == 2
    assert "allowed: original, diffusers" in capsys.readouterr().err
