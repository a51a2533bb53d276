"""The pages for people who come from other programs: all that stands in the column "here" runs."""

import re
from pathlib import Path

import pytest
import torch
from community_files import make_controlnet, write_original
from diffusers import UNet2DConditionModel
from pages import ROOT, blocks, inline_commands
from PIL import Image
from safetensors.torch import save_file

from bdm.cli import main
from bdm.pipeline import BridgePipeline

MODEL = ROOT / "assets/emoji"
LORA = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
YAML = "ours:\n  base_path: webui\n  checkpoints: models/Stable-diffusion\n  loras: models/Lora\n"
pytestmark = pytest.mark.skipif(
    not (MODEL / "branch" / "config.json").exists(), reason="assets/emoji has no branch"
)


@pytest.fixture(scope="module")
def shipped():
    return BridgePipeline.from_pretrained(str(MODEL))


@pytest.fixture(autouse=True)
def one_pipeline(shipped, monkeypatch):
    """The shipped model is read once, and handed out as it was."""
    scheduler = shipped.scheduler

    def handed_out(*_, **__):
        shipped.plugins.clear()
        shipped.scheduler = scheduler
        return shipped

    monkeypatch.setattr(BridgePipeline, "from_pretrained", handed_out)


@pytest.fixture(scope="module")
def place(shipped, tmp_path_factory):
    """A folder with all files that the pages name, and the webui's folder of models."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for folder in ("webui/models/Stable-diffusion", "webui/models/Lora", "webui/embeddings", "wildcards"):
        (place / folder).mkdir(parents=True)
    (place / "assets").symlink_to(ROOT / "assets")
    (place / "extra_model_paths.yaml").write_text(YAML)
    (place / "wildcards/colour.txt").write_text("蓝色\n绿色\n", encoding="utf-8")
    (place / "prompts.txt").write_text("红灯笼\n--prompt 月饼 --seed 5\n", encoding="utf-8")
    _plugins(shipped, place)
    for link, file in (("models/Stable-diffusion/style.safetensors", "style.safetensors"),
                       ("models/Lora/ink.safetensors", "ink.safetensors"),
                       ("embeddings/mood.pt", "mood.pt")):  # fmt: skip
        (place / "webui" / link).symlink_to(place / file)
    Image.radial_gradient("L").resize((64, 64)).save(place / "photo.png")
    Image.linear_gradient("L").resize((32, 32)).save(place / "mask.png")
    assert main(["infer", "红灯笼", "--steps", "2", "--out", str(place / "lantern.png")]) == 0
    return place


def _plugins(shipped, place):
    rows, columns = shipped.unet.get_submodule(LORA).weight.shape
    name = f"lora_unet_{LORA.replace('.', '_')}"
    lora = {f"{name}.lora_down.weight": torch.randn(2, columns),
            f"{name}.lora_up.weight": torch.randn(rows, 2)}  # fmt: skip
    save_file(lora, place / "ink.safetensors", {"ss_network_dim": "2"})
    torch.save({"string_to_param": {"*": torch.randn(1, columns)}}, place / "mood.pt")
    write_original(shipped, place / "style.safetensors")
    unet = UNet2DConditionModel.from_config(shipped.unet.config)
    make_controlnet(unet).save_pretrained(place / "edges")


def run(words, place, capsys):
    """Run a command of a page in few steps; returns the pictures that are new."""
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*.png")}
    more = ["--steps", "2", "--redraw"] if words[1] in ("infer", "sheet") else []
    assert main([*words[1:], *more]) == 0, f"{words}: {capsys.readouterr().err}"
    return [path for path in place.rglob("*.png") if before.get(path) != path.stat().st_mtime_ns]


@pytest.mark.parametrize("name", ["from_a1111.md", "from_comfyui.md", "from_diffusers.md"])
def test_what_stands_here_runs(name, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    page = ROOT / "docs" / name
    for block in blocks(page, "python"):
        names: dict = {}
        exec(block.text, names)
        for cell in python_cells(page):
            exec(cell, names)
    found = inline_commands(page)
    assert len(found) >= 3
    for words in found:
        drawn = run(words, place, capsys)
        assert bool(drawn) == (words[1] in ("infer", "sheet")), words


def python_cells(page: Path):
    """The Python in the last column of a page's tables."""
    cells = re.findall(
        r"\| `((?:pipe|bdm\.|modes|setattr)[^`]*)` \|$", page.read_text(encoding="utf-8"), re.M
    )
    assert len(cells) > 15
    return cells


def test_both_columns_of_every_table_are_filled():
    for name in ("from_a1111.md", "from_comfyui.md", "from_diffusers.md"):
        rows = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("| ")]
        for row in rows:
            cells = re.split(r"(?<!\\)\|", row)[1:-1]
            assert len(cells) == 2, row
            assert all(cell.strip() for cell in cells), row
