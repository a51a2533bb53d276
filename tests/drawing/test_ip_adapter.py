"""An IP-Adapter is part of a request: recorded by its hashes, drawn again, taken off behind its picture."""

import shutil
from pathlib import Path

import pytest
import torch
from community_files import ip_adapter_tensors, make_image_encoder
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from bdm.cli import main
from bdm.drawing.picture_reading import picture_request, picture_texts

PLAIN = ["infer", "龙", "--model", "model", "--steps", "2", "--seed", "3"]
SHOWN = [*PLAIN, "--ip-adapter", "ip.safetensors", "--ip-encoder", "seeing", "--ip-image", "photo.png"]


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipe.register_modules(feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    pipe.save_pretrained(tmp_path / "model")
    save_file(ip_adapter_tensors(pipe.unet), tmp_path / "ip.safetensors")
    make_image_encoder().save_pretrained(tmp_path / "seeing")
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_with_an_ip_adapter_is_drawn_again_bit_for_bit(folder, capsys):
    assert main([*SHOWN, "--ip-scale", "0.7", "--out", "a.png"]) == 0, capsys.readouterr().err
    assert main([*PLAIN, "--out", "plain.png"]) == 0
    assert Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    (use,) = picture_request(Path("a.png")).plugins
    assert (use.kind, use.strength) == ("ip_adapter", 0.7)
    assert all(file is not None and file.hash for file in (use.file, use.picture, use.encoder))
    assert f'IP-Adapter: "Model: ip [{use.file.hash}], Weight: 0.7"' in picture_texts(Path("a.png"))[0]
    (folder / "elsewhere").mkdir()
    shutil.move("ip.safetensors", "elsewhere/other.safetensors")
    shutil.move("seeing", "elsewhere/other")
    shutil.move("photo.png", "renamed.png")
    again = ["infer", "--from", "a.png", "--out", "b.png"]
    assert main([*again, "--models", "elsewhere"]) == 0, capsys.readouterr().err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    shutil.rmtree("elsewhere")
    assert main([*again, "--redraw"]) == 2
    error = capsys.readouterr().err
    assert f"ip_adapter ip.safetensors (hash {use.file.hash})" in error
    assert f"image_encoder seeing (hash {use.encoder.hash})" in error


def test_it_acts_on_its_own_rows_alone(folder):
    assert main([*SHOWN, "--out", "a.png"]) == 0
    assert main([*PLAIN, "--out", "plain.png"]) == 0
    rows = [picture_request(Path(name)).to_json() for name in ("plain.png", "a.png", "plain.png")]
    import json

    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["infer", "--prompts", "rows.jsonl", "--out", "drawn", "--batch", "2", "--models", "."]
    assert main(arguments) == 0
    drawn = [Path(f"drawn/0000{i}.png") for i in range(3)]
    with Image.open("plain.png") as plain, Image.open("a.png") as shown:
        for path, wanted in zip(drawn, (plain, shown, plain), strict=True):
            with Image.open(path) as picture:
                assert picture.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ip-scale", "1"], "--ip-scale is of an IP-Adapter; give its file with --ip-adapter"),
        (["--ip-adapter", "ip.safetensors"], "--ip-adapter needs --ip-image"),
        ([*SHOWN[6:], "--ip-encoder", "model"], "model holds no image encoder"),
        ([*SHOWN[6:], "--ip-adapter", "none.safetensors"], "none.safetensors: no such file"),
        ([*SHOWN[6:], "--ip-adapter", "model/unet/diffusion_pytorch_model.safetensors"], "is no IP-Adapter"),
        ([*SHOWN[6:], "--ip-image", "none.png"], "none.png"),
    ],
)  # fmt: skip
def test_mistakes(folder, arguments, message, capsys):
    assert main([*PLAIN, "--out", "a.png", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a.png").exists()
