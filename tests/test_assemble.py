import json
import re
from pathlib import Path

import pytest
from agreement import outputs_agree
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from bdm.assemble import assemble
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.pipeline import BridgePipeline

ASSETS = Path(__file__).parent.parent / "assets"


@pytest.fixture
def parts(pipe, tmp_path):
    stock = StableDiffusionPipeline(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.unet,
        pipe.scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(tmp_path / "backbone")
    pipe.branch.save_pretrained(tmp_path / "branch")
    (tmp_path / "branch/card.json").write_text("{}")
    pipe.native_text_encoder.save_pretrained(tmp_path / "native")
    return tmp_path


def test_assembled_parts_draw_the_same_without_their_vocabularies(pipe, parts):
    out = parts / "model"
    assemble(str(parts / "backbone"), str(parts / "branch"), str(parts / "native"), out, vocabularies=False)
    assert not list(out.rglob("tokenizer.json"))
    assert (out / "branch/card.json").exists()
    (out / "branch/old.txt").write_text("of the pipeline before")
    assemble(str(parts / "backbone"), str(parts / "branch"), str(parts / "native"), out, vocabularies=False)
    assert not (out / "branch/old.txt").exists(), "our own folder is replaced as a whole"
    loaded = BridgePipeline.from_pretrained(out)
    options = dict(seed=1, num_inference_steps=2, output_type="latent", prompt_en="best (quality:1.2)")
    loaded.scheduler = pipe.scheduler
    outputs_agree(loaded("红灯笼", **options).images, pipe("红灯笼", **options).images)


@pytest.mark.parametrize("index", [None, {"_class_name": "StableDiffusionPipeline"}])
def test_folders_of_something_else_are_not_replaced(tmp_path, index):
    (tmp_path / "thesis.txt").write_text("three years")
    if index:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="files in it, which stay"):
        assemble("backbone", "branch", "native", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("damage", ["remove", "truncate", "config"])
def test_damaged_backbones_are_named(parts, damage):
    folder = parts / "backbone"
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    match damage:
        case "remove":
            weights.unlink()
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "config":
            (folder / "unet/config.json").unlink()
    with pytest.raises(UserError, match="unet"):
        load_backbone(folder)


CARDS = sorted(ASSETS.rglob("card.json"))


@pytest.mark.skipif(not CARDS, reason="no weights are shipped yet")
def test_shipped_weights_are_small_half_precision_and_have_cards():
    files = sorted(ASSETS.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 130e6
    for file in files:
        # A connector is of its encoder's run.
        place = file.parent.parent if file.parent.name == "connector" else file.parent
        card = json.loads((place / "card.json").read_text())
        assert {"command", "seed", "steps", "seconds", "final_loss"} <= card.keys()
        assert re.match(r"(python|torchrun --nproc_per_node \d+) train\.py configs/", card["command"])
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118
    names = {f.name for f in ASSETS.rglob("*")}
    assert not names & {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}, (
        "vocabularies come from pip packages"
    )
