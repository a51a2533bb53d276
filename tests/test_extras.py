"""What is installed with the library, and what is named where it is missing."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from PIL import Image

from bdm import extras
from bdm.cli import main
from bdm.data.shards import expand_urls
from bdm.drawing.grid import label_font
from bdm.drawing.library import DEFAULT_MODEL
from bdm.emoji.world import World
from bdm.errors import UserError
from bdm.extras import PACKAGES, require_packages
from bdm.models.samplers import make_scheduler
from bdm.plugins.controlnet import annotate
from bdm.text.encoders import load_tokenizer
from bdm.text.vocabulary import chinese_clip_tokenizer
from bdm.training.plots import plot_metrics

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUPS: dict[str, list[str]] = PROJECT["optional-dependencies"]
needs_weights = pytest.mark.skipif(not DEFAULT_MODEL.exists(), reason="assets/emoji is missing")


def normalised(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # pyright: ignore[reportOptionalSubscript]


def distributions(groups: str) -> set[str]:
    """Names of what ``bdm[a,b]`` adds, through all groups that those name."""
    found: set[str] = set()
    for group in groups.split(","):
        for requirement in GROUPS[group]:
            inner = re.fullmatch(r"bdm\[(.*)\]", requirement)
            found |= distributions(inner[1]) if inner else {normalised(requirement)}
    return found


def test_every_group_brings_the_modules_that_its_users_look_for():
    known = packages_distributions()
    checked = 0
    for need, (command, modules) in PACKAGES.items():
        group = re.fullmatch(r"'bdm\[(.*)\]'", command)
        if group is None:
            continue
        brought = distributions(group[1])
        for module in modules:
            owners = {name.lower().replace("_", "-") for name in known.get(module.split(".")[0], [])}
            if not owners:  # not installed here
                owners = {module.replace("_", "-")}
            assert owners & brought or (module == "google.protobuf" and "protobuf" in brought), (need, module)
            checked += 1
    assert checked > 25


def test_drawing_has_nothing_optional_among_its_dependencies():
    hard = {normalised(text) for text in PROJECT["dependencies"]}
    assert hard.isdisjoint(distributions("train,prepare,evaluate,bench,plan,parquet,samplers,annotators"))
    assert {"torch", "diffusers", "transformers", "cn-clip", "peft", "safetensors", "accelerate"} <= hard


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate", "bench infer", "plan"])
def test_commands_name_their_extra_before_anything_heavy(command, monkeypatch, capsys):
    name = command.split()[0]
    for module in PACKAGES[f"bdm {name}"][1]:
        with monkeypatch.context() as patch:
            patch.setattr(extras, "is_installed", lambda asked, module=module: asked != module)
            assert main([*command.split(), "no.yaml"]) == 2
        error = capsys.readouterr().err
        assert f"needs the package {module}, which is not installed; run: pip install 'bdm[{name}]'" in error
        assert error.count("\n") == 1


def test_what_is_missing_is_named_where_it_is_asked_for(monkeypatch, tmp_path):
    picture = Image.new("RGB", (16, 16))
    (tmp_path / "spiece.model").touch()
    askers = {
        "the sampler LMS": lambda: make_scheduler("LMS Karras"),
        "the annotator canny": lambda: annotate(picture, "canny"),
        "an annotator other than canny": lambda: annotate(picture, "hed"),
        "the emoji world": World,
        "data in shards": lambda: expand_urls("{0..3}.tar"),
        "a chart": lambda: plot_metrics(tmp_path),
        "a SentencePiece vocabulary": lambda: load_tokenizer(tmp_path),
        "Chinese CLIP's vocabulary": chinese_clip_tokenizer,
    }
    extras._package_folder.cache_clear()
    for need, ask in askers.items():
        command, modules = PACKAGES[need]
        for module in modules:
            with monkeypatch.context() as patch:
                patch.setattr(extras, "is_installed", lambda asked, module=module: asked != module)
                with pytest.raises(UserError) as raised:
                    ask()
            message = f"{need} needs the package {module}, which is not installed; run: pip install {command}"
            assert str(raised.value) == message


def test_labels_without_a_font_say_so(monkeypatch, caplog):
    monkeypatch.setattr("bdm.drawing.grid._CJK_FONTS", ())
    monkeypatch.setattr(extras, "is_installed", lambda module: False)
    extras._package_folder.cache_clear()
    label_font.cache_clear()
    assert label_font(12) is not None
    label_font.cache_clear()
    assert "pip install 'bdm[fonts]'" in caplog.text


def test_a_package_around_the_module_may_be_missing_too():
    assert not extras.is_installed("no_such_package.inside")
    require_packages("adamw", "what is no setting")


@needs_weights
def test_drawing_needs_none_of_them(tmp_path):
    # What the hard dependencies bring along themselves.
    brought = {"yaml", "fsspec", "open_clip", "cn_clip"}
    modules = {module for _, modules in PACKAGES.values() for module in modules} - brought
    command = [sys.executable, str(ROOT / "tests/without.py"), ",".join(modules)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = ["infer", "红灯笼", "--steps", "1", "--out", "lantern.png"]
    subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    with Image.open(tmp_path / "lantern.png") as picture:
        assert torch.tensor(list(picture.getdata())).float().std() > 1
    refused = subprocess.run(
        [*command, "train", "configs/quickstart.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.endswith("run: pip install 'bdm[train]'\n")
