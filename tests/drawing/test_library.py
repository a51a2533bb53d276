"""Files in A1111's and ComfyUI's folders are found by stem, alias or hash, and listed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TEXT_DIM

from bdm import FileRef, PluginUse, PromptRules, Request
from bdm.cli import main
from bdm.drawing.complete import complete
from bdm.drawing.known_hashes import is_noted, known_hash, known_hashes
from bdm.drawing.library import Library
from bdm.drawing.model_folders import entries, yaml_folders
from bdm.drawing.request import Versions
from bdm.drawing.trigger_words import lacking
from bdm.errors import UserError
from bdm.plugins.registry import shown_hash


def lora(path, alias="", seed=0):
    """A small LoRA."""
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {f"{layer}.lora_down.weight": torch.randn(2, TEXT_DIM),
               f"{layer}.lora_up.weight": torch.randn(16, 2)}  # fmt: skip
    save_file(factors, path, {"ss_output_name": alias, "modelspec.trigger_phrase": "ink style"})
    return path


def embedding(path, width=TEXT_DIM):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.randn(2, width)}, path)
    return path


LAYOUTS = {
    "a1111": ("models/Lora/sub/ink.safetensors", "embeddings/mood.safetensors"),
    "comfyui": ("models/loras/ink.safetensors", "models/embeddings/mood.safetensors"),
    "models alone": ("Lora/ink.safetensors", "embeddings/mood.safetensors"),
    "flat": ("ink.safetensors", "mood.safetensors"),
    "capitals": ("MODELS/../LORA/ink.safetensors", "Embeddings/mood.safetensors"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_others(tmp_path, layout):
    ink, mood = (tmp_path / place for place in LAYOUTS[layout])
    lora(ink, "Ink_Wash")
    embedding(mood)
    (tmp_path / "notes.txt").write_text("x")
    library = Library([tmp_path])
    hashes = known_hashes(ink)
    for said in ("ink", "INK", "ink.safetensors", "Ink_Wash", hashes["sha256"], hashes["hash"],
                 hashes["data hash"], hashes["sha256"][:8].upper()):  # fmt: skip
        assert library.find(said, "adapter").samefile(ink), said
    assert library.find("mood", "embedding").samefile(mood)
    assert library.find("mood", "adapter") == Path("mood"), "of another kind"
    with pytest.raises(UserError, match="no adapter is called inkk; near it are ink"):
        library.find("inkk", "adapter")


def test_extra_model_paths(tmp_path):
    ink = lora(tmp_path / "webui/models/Lora/ink.safetensors")
    wash = lora(tmp_path / "more/wash.safetensors", seed=1)
    (tmp_path / "extra_model_paths.yaml").write_text(
        f"a111:\n  base_path: {tmp_path}/webui/\n  checkpoints: models/Stable-diffusion\n  loras: |\n"
        f"    models/Lora\n    ../more\n  vae: none\nother: 3\n"
    )
    assert ("adapter", tmp_path / "webui/models/Lora") in yaml_folders(tmp_path / "extra_model_paths.yaml")
    library = Library([tmp_path / "extra_model_paths.yaml"])
    assert library.find("ink", "adapter").samefile(ink)
    assert library.find("wash", "adapter").samefile(wash)
    (tmp_path / "extra_model_paths.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="names no folders"):
        list(entries(tmp_path / "extra_model_paths.yaml"))


def test_environment_names_folders_too(tmp_path, monkeypatch):
    ink = lora(tmp_path / "a/ink.safetensors")
    monkeypatch.setenv("BDM_MODELS", str(tmp_path / "a"))
    assert Library().find("ink", "adapter") == ink
    monkeypatch.setenv("BDM_MODELS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such folder"):
        Library().find("ink", "adapter")


def test_two_of_one_name(tmp_path):
    one = lora(tmp_path / "models/Lora/a/ink.safetensors")
    lora(tmp_path / "models/Lora/b/ink.safetensors", seed=1)
    library = Library([tmp_path])
    with pytest.raises(UserError, match="may be .*a/ink.safetensors, .*b/ink.safetensors"):
        library.find("ink", "adapter")
    assert library.find("a/ink.safetensors", "adapter") == one
    shutil.copy(one, tmp_path / "models/Lora/b/ink.safetensors")
    assert library.find("ink", "adapter").name == "ink.safetensors", "copies of one are one"


def test_links_that_lead_round_in_a_circle(tmp_path):
    lora(tmp_path / "Lora/ink.safetensors")
    (tmp_path / "Lora/again").symlink_to(tmp_path / "Lora")
    assert [entry.path.name for entry in entries(tmp_path)] == ["ink.safetensors"]
    assert len(list(Library([tmp_path, tmp_path / "Lora"]))) == 1


def test_a_file_is_known_by_its_hash_alone(tmp_path):
    ink = lora(tmp_path / "Lora/renamed.safetensors")
    lora(tmp_path / "Lora/ink.safetensors", seed=1)
    wanted = FileRef("ink.safetensors", known_hash(ink, "adapter"))
    assert Library([tmp_path]).located(wanted, "adapter").source == ink
    with pytest.raises(UserError, match=r"adapter ink.safetensors \(hash 0123\)"):
        Library([tmp_path]).located(FileRef("ink.safetensors", "0123"), "adapter")


def test_prompts_call_embeddings_by_name(tmp_path):
    """Those of the folders that are kept for them, as in A1111; a picture that was drawn keeps its own."""
    embedding(tmp_path / "embeddings/bad-Mood.safetensors")
    embedding(tmp_path / "others/loose.safetensors")
    library = Library([tmp_path])

    def called(**said):
        found = complete(Request(**said), library).plugins
        return [(plugin.kind, plugin.name) for plugin in found]

    mood = [("embedding", "bad-Mood")]
    assert called(prompt="龙", negative_en="blurry, (bad-mood:1.2)") == mood
    assert called(prompt="龙bad-Mood") == mood
    routed = complete(Request(prompt="龙，bad-Mood"), library)
    assert lacking([routed]) == {}
    assert lacking([replace(routed, rules=PromptRules(routing=False))]) == {"bad-Mood": ["bad-Mood"]}
    assert called(prompt_en="embedding:bad-mood") == mood
    assert called(prompt_en="bad-moods, loose, mood") == []
    assert called(prompt_en="bad-mood", versions=Versions("0.1.0")) == []
    given = PluginUse(kind="embedding", file=FileRef.to(tmp_path / "embeddings/bad-Mood.safetensors"))
    assert called(prompt_en="bad-mood", plugins=(given,)) == mood
    assert called(prompt_en="bad-mood", rules=PromptRules(emphasis="official")) == []


def test_hashes_are_noted_and_forgotten_with_the_file(tmp_path):
    ink = lora(tmp_path / "ink.safetensors")
    assert not is_noted(ink)
    assert known_hash(ink, "adapter") == shown_hash(ink, "adapter")
    assert is_noted(ink)
    before = known_hashes(ink)
    save_file({key: tensor + 1 for key, tensor in load_file(ink).items()}, ink)
    assert not is_noted(ink)
    assert known_hashes(ink) != before
    mood = tmp_path / "mood.pt"
    torch.save({"string_to_param": {"*": torch.ones(1, 8)}}, mood)
    assert known_hash(mood, "embedding") == shown_hash(mood, "embedding")


def test_what_lies_in_folders_is_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BDM_MODELS", raising=False)
    lora(tmp_path / "models/Lora/ink.safetensors")
    lora(tmp_path / "models/Lora/水墨.safetensors", seed=1).with_suffix(".json").write_text(
        '{"activation text": "brush, wash"}'
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "models/Lora/ink.preview.png")
    embedding(tmp_path / "embeddings/mood.safetensors", 768)
    (tmp_path / "models/Lora/broken.safetensors").write_bytes(b"x")
    assert main(["models", str(tmp_path), "--json"]) == 0
    found = {model["name"]: model for model in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(found) == {"ink", "水墨", "mood", "broken"}
    ink = found["ink"]
    assert (ink["kind"], ink["trigger words"], ink["preview"]) == ("adapter", "ink style", "ink.preview.png")
    assert ink["hash"] == shown_hash(tmp_path / "models/Lora/ink.safetensors", "adapter")
    assert found["水墨"]["trigger words"] == "brush, wash"
    assert (found["mood"]["kind"], found["mood"]["base"]) == ("embedding", "SD1.5")
    assert found["broken"]["base"].startswith("cannot be read: ")
    assert {model["cached"] for model in found.values()} == {"no"}
    assert main(["models", str(tmp_path), "--kind", "adapter"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["name", "kind", "base"]
    assert [line.split()[0] for line in lines] == ["broken", "ink", "水墨"]
    assert " yes " in lines[1]
    assert main(["models"]) == 2
    assert "give one, or name some in BDM_MODELS" in capsys.readouterr().err
