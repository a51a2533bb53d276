"""What the recipes of community plug-ins train and write."""

import pytest
import torch
from tiny_recipes import COMMUNITY, make_recipe, make_source

from bdm.data.batch import fixed_batch
from bdm.models.backbone import load_backbone
from bdm.plugins import Plugins
from bdm.text.english import encode_english


def train_and_save(kind, folders, tmp_path):
    """A recipe of a community plug-in, stepped a few times and saved."""
    recipe = make_recipe(kind, folders, make_source("en", groups=("shared",)))
    recipe.requires_grad_(False)
    parameters = [p.requires_grad_(True) for part in recipe.parts().values() for p in part.parameters()]
    frozen = {name: p.detach().clone() for name, p in recipe.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for i in range(2):
        optimizer.zero_grad()
        recipe(fixed_batch(recipe.source, 4, i))["loss"].backward()
        optimizer.step()
    for name, parameter in recipe.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    recipe.eval().save(tmp_path / kind)
    return recipe


@pytest.mark.parametrize("kind", COMMUNITY)
def test_what_a_recipe_writes_acts_as_in_training(folders, tmp_path, kind):
    """The saved file, attached as a plug-in to the same backbone, predicts what the recipe's own networks
    predict.
    """
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 700])
    recipe = train_and_save(kind, folders, tmp_path)
    denoiser = recipe.denoiser
    captions = denoiser.captions.with_trigger(["a cat"] * 2)
    path = next(iter((tmp_path / kind).iterdir())) if kind != "controlnet" else tmp_path / kind
    backbone = load_backbone(folders[0])
    plugins = Plugins(backbone)
    plain = encode_english(captions, backbone.text_encoder, backbone.tokenizer)
    before = backbone.unet(*inputs, plain).sample
    plugins.attach(path)
    text = encode_english(captions, backbone.text_encoder, backbone.tokenizer)
    control = torch.rand(2, 3, 64, 64).round()
    given = {"edges": control} if kind == "controlnet" else {}
    with torch.no_grad(), plugins.during_call(control if given else None):
        ours = backbone.unet(*inputs, text).sample
    with torch.no_grad():
        theirs = denoiser.predict(*inputs, denoiser.captions.encode(captions), **given)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)  # files hold half precision
    assert (ours - before).abs().max() > 0.05
    held_out = recipe.source.validation
    drawn = denoiser.preview.draw([held_out.caption(0)], 4.0, 0, held_out)
    assert drawn.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("trigger", "told"), [("ink", "ink"), ("", "")])
def test_a_dropped_caption_keeps_the_trigger(folders, monkeypatch, trigger, told):
    recipe = make_recipe("checkpoint", folders, trigger=trigger, empty_caption=1.0)
    heard, own = [], recipe.features.encode
    monkeypatch.setattr(recipe.features, "encode", lambda texts: heard.append(list(texts)) or own(texts))
    recipe(fixed_batch(recipe.source, 3, seed=0))
    assert heard == [[told] * 3]


def test_states_name_their_parts_as_ever(folders):
    """What a run has saved goes on."""
    parts = {kind: list(make_recipe(kind, folders).parts()) for kind in COMMUNITY}
    assert parts["checkpoint"] == ["unet"]
    assert parts["embedding"] == ["vectors"]
    assert parts["controlnet"] == ["controlnet"]
    assert parts["lora"] == parts["lcm_lora"]
    assert "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_lora_A" in parts["lora"]
