"""Finished runs become shipped weights: small, with cards, and all of them or none."""

import json
import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdm.config import ShipConfig
from bdm.errors import UserError
from bdm.method.branch import BranchModel
from bdm.pipeline import BridgePipeline
from bdm.ship import ship, without_machine
from bdm.training.recipes.text_slot import with_connector

CARD = {
    "command": "python train.py configs/emoji_64/lora.yaml",
    "seed": 0,
    "note": "of /home/me/runs/x/model",
}


@pytest.fixture
def runs(pipe, tmp_path):
    """Runs as training leaves them, and the configuration that ships them."""
    stock = StableDiffusionPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path / "runs"
    stock.save_pretrained(folder / "backbone")
    pipe.branch.save_pretrained(folder / "branch")
    pipe.native_text_encoder.save_pretrained(folder / "native")
    for place in ("backbone", "backbone/vae", "backbone/text_encoder", "branch", "native"):
        (folder / place / "card.json").write_text(json.dumps(CARD))
    (folder / "lora").mkdir()
    save_file(
        {"lora_unet_x.alpha": torch.tensor(4.0)}, folder / "lora/model.safetensors", {"of": "/a/b/c.pt"}
    )
    (folder / "lora/card.json").write_text(json.dumps(CARD))
    (folder / "lora/model.safetensors").chmod(0o600)
    return folder


def config(runs, **changes):
    parts = {
        "world": {name: str(runs / name) for name in ("backbone", "branch")}
        | {"native_text_encoder": str(runs / "native")},
        "world/branch_plain": str(runs / "branch"),
        "plugins/seal/seal.safetensors": str(runs / "lora/model.safetensors"),
    }
    return ShipConfig(**{"out": runs.parent / "assets", "parts": parts} | changes)


def test_what_is_shipped_is_small_has_cards_and_names_no_machine(runs, pipe):
    out = runs.parent / "assets"
    (out / "world/judge").mkdir(parents=True)
    (out / "world/judge/card.json").write_text("{}")
    said = str(ship(config(runs)))
    assert "plugins/seal/seal.safetensors" in said
    assert "in all, of 130 MB" in said
    assert (out / "world/judge/card.json").exists(), "what is beside the pipeline stays"
    assert {p.name for p in (out / "plugins/seal").iterdir()} == {"seal.safetensors", "card.json"}
    for file in (path for path in out.rglob("*") if path.is_file()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o644 or "judge" in file.parts
        if file.suffix == ".safetensors":
            assert (file.parent / "card.json").is_file()
            with safe_open(file, "pt") as opened:
                assert "/a/b" not in str(opened.metadata())
                assert {opened.get_tensor(name).dtype for name in opened.keys()} <= {torch.float16}  # noqa: SIM118
        elif file.suffix == ".json":
            assert str(runs) not in file.read_text()
            assert "/home" not in file.read_text()
    for name, tensor in load_file(out / "world/branch_plain/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, pipe.branch.state_dict()[name].half())
    loaded = BridgePipeline.from_pretrained(out / "world")
    assert loaded("红灯笼", num_inference_steps=1, output_type="latent", seed=0).images.isfinite().all()
    ship(config(runs))  # what was shipped before is replaced


def contents(folder: Path):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_not_finished_is_named_or_left_out(runs):
    (runs / "branch").rename(runs / "elsewhere")
    with pytest.raises(UserError, match=r"2 of 3 parts are not trained, such as world .*--finished"):
        ship(config(runs))
    assert not (runs.parent / "assets").exists()
    done = ship(config(runs), finished=True)
    assert done.missing == ("world", "world/branch_plain")
    assert set(done.sizes) == {"plugins/seal/seal.safetensors"}
    assert "world: left out, its run is not finished" in str(done)


@pytest.mark.parametrize("wrong", ["limit", "card", "foreign", "large"])
def test_what_may_not_be_shipped_is_refused_and_nothing_is_written(runs, wrong):
    out, limit = runs.parent / "assets", 130.0
    (out / "plugins/seal").mkdir(parents=True)
    match wrong:
        case "limit":
            limit = 0.01
        case "card":
            (runs / "lora/card.json").unlink()
        case "foreign":
            (out / "plugins/seal/thesis.txt").write_text("three years")
        case "large":
            save_file({"x": torch.tensor([1e9])}, runs / "lora/model.safetensors")
    before = contents(out)
    messages = {"limit": "limit_mb is 0.01", "card": "no card.json", "foreign": "no shipped weights",
                "large": "float16 ends at"}  # fmt: skip
    with pytest.raises(UserError, match=messages[wrong]):
        ship(config(runs, limit_mb=limit))
    assert contents(out) == before


def test_paths_of_a_machine_are_taken_out():
    here = str(Path.cwd() / "runs/x/model")
    assert without_machine({"a": [here, "/home/me/b.pt"], "_name_or_path": "x"}) == {
        "a": ["runs/x/model", "b.pt"]
    }
    assert without_machine('{"a": "/home/me/b"}') == '{"a": "b"}'
    for text in ("python train.py configs/a.yaml", "https://a.b/c/d", "zh/en", "/"):
        assert without_machine(text) == text


@pytest.mark.parametrize("name", ["/etc/x", "../x", ""])
def test_a_place_outside_is_refused(runs, name):
    with pytest.raises(ValueError, match="no place under out"):
        config(runs, parts={name: str(runs / "branch")})


def test_what_a_run_trained_within_a_pipeline_ships_with_that_runs_card(runs, pipe, tmp_path):
    """A text encoder and the connector in it, as kind: align leaves them: alone, and as a pipeline's part."""
    native = with_connector(pipe.native_text_encoder, pipe.text_encoder.config.hidden_size)
    slot = BridgePipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler, None, native
    )
    slot.save_pretrained(runs / "aligned")
    (runs / "aligned/card.json").write_text(json.dumps(CARD | {"seed": 7}))
    encoder = str(runs / "aligned/native_text_encoder")
    branch = BranchModel.from_backbone(pipe.unet, native.text_dim)
    branch.save_pretrained(runs / "reads_it")
    (runs / "reads_it/card.json").write_text(json.dumps(CARD))
    world = {
        "backbone": str(runs / "backbone"),
        "branch": str(runs / "reads_it"),
        "native_text_encoder": encoder,
    }
    ship(config(runs, parts={"world": world, "alone": encoder}))
    for folder in (tmp_path / "assets/alone", tmp_path / "assets/world/native_text_encoder"):
        assert json.loads((folder / "card.json").read_text())["seed"] == 7
        assert (folder / "connector/diffusion_pytorch_model.safetensors").is_file()
    loaded = BridgePipeline.from_pretrained(tmp_path / "assets/world")
    assert loaded.native_text_encoder.text_dim == native.text_dim
    (runs / "aligned/card.json").unlink()
    with pytest.raises(UserError, match="no card.json beside"):
        ship(config(runs, parts={"alone": encoder}))
