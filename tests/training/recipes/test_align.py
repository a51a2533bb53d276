"""A native text encoder that says to a UNet what the English one says."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from tiny import make_native
from tiny_recipes import fresh, make_source

from bdm.data.batch import fixed_batch
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.text.english import encode_english
from bdm.training.recipes.align import align_recipe, attended


def make(folders, tmp_path, source=None, **options):
    own = {"native_text_encoder": fresh(tmp_path / "voc"), "empty_caption": 0.5}
    source = source or make_source(groups=("shared",))
    return align_recipe(source, folders[0], **own | options).eval()


def say_english(recipe, monkeypatch):
    """Let the native side encode each caption's English."""
    source, stock = recipe.source, load_backbone(recipe.backbone)
    meaning = {source[i].caption: source[i].english for i in range(len(source))} | {"": ""}
    monkeypatch.setattr(
        recipe.features,
        "encode",
        lambda texts: encode_english([meaning[t] for t in texts], stock.text_encoder, stock.tokenizer),
    )


@pytest.mark.parametrize("match", ["attention", "pooled", "position"])
def test_the_same_features_make_no_loss_and_others_do(folders, tmp_path, monkeypatch, match):
    encoder = fresh(tmp_path / "voc") | {"chunk_length": 76}
    recipe = make(folders, tmp_path, match=match, native_text_encoder=encoder)
    recipe.backbone = folders[0]
    batch = fixed_batch(recipe.source, 4, 0)
    assert recipe(batch)["loss"] > 0.01
    say_english(recipe, monkeypatch)
    assert recipe(fixed_batch(recipe.source, 4, 0))["loss"] < 1e-9


def test_attention_compares_what_the_unets_own_layers_give(folders, tmp_path):
    """The first of them, beside whole passes of the UNet: up to there both languages are told the same."""
    recipe = make(folders, tmp_path, empty_caption=0.0)
    seen: list[torch.Tensor] = []
    unet, name = recipe.denoiser.unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    batch = fixed_batch(recipe.source, 2, 0)
    told = recipe._tell(batch, batch.captions)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([600, 900])
    english, native = attended(unet, x_t, t, told.english, told.native)[0]
    for features, expected in ((told.english, english), (told.native, native)):
        hook = unet.get_submodule(name).register_forward_hook(lambda m, i, output: seen.append(output))
        unet(x_t, t, features)
        hook.remove()
        torch.testing.assert_close(expected, seen.pop())


@pytest.mark.parametrize("match", ["pooled", "position"])
def test_keys_and_values_of_every_layer_count_the_same(folders, tmp_path, match):
    """Beside the projections themselves; of tokens, those that both languages have (13 of 13 and 77 here)."""
    recipe = make(folders, tmp_path, match=match, empty_caption=0.0)
    batch = fixed_batch(recipe.source, 3, 0)
    loss = recipe(batch)["loss"]
    stock = load_backbone(folders[0])
    english = encode_english(list(batch.english), stock.text_encoder, stock.tokenizer)
    native = recipe.denoiser.native_text_encoder.encode(batch.captions)
    assert (native.shape[1], english.shape[1]) == (13, 77)
    if match == "pooled":
        english, native = (x.mean(1, keepdim=True) for x in (english, native))
    apart, size = torch.zeros(3), torch.zeros(3)
    for name, weight in stock.unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            theirs, ours = (x[:, :13] @ weight.T / weight.norm() for x in (english, native))
            apart += (ours - theirs).square().sum((1, 2))
            size += theirs.square().sum((1, 2))
    torch.testing.assert_close(loss, (apart / size).mean(), rtol=1e-4, atol=1e-5)


def test_only_attention_asks_for_pictures(folders, tmp_path):
    """Nothing is encoded for keys and values, and the pictures change nothing."""
    batch = fixed_batch(make_source(groups=("shared",)), 4, 0)
    assert batch.pixels is not None
    batches = [batch, dataclasses.replace(batch, pixels=255 - batch.pixels)]
    for match in ("attention", "position"):
        recipe = make(folders, tmp_path, match=match, cache=True, empty_caption=0.0)
        plain = recipe.source
        losses = [recipe(batch)["loss"].item() for batch in batches]
        assert (losses[0] != losses[1]) == (match == "attention")
        recipe.fill_caches(Accelerator(cpu=True))
        assert (recipe.source is plain) == (match == "position")


@pytest.mark.parametrize(("part", "options"), [("text_encoder", {}), ("connector", {"connector": {}})])
def test_the_encoder_or_the_connector_learns_and_nothing_else(folders, tmp_path, part, options):
    own = {"native_text_encoder": folders[1]} if options else {}
    recipe = make(folders, tmp_path, train=(part,), **options, **own)
    recipe.train_parts()
    recipe(fixed_batch(recipe.source, 4, 0))["loss"].backward()
    trained = {id(p) for p in recipe.parts()[part].parameters()}
    assert trained
    assert all((p.grad is not None) == (id(p) in trained) for p in recipe.parameters())


def test_samples_without_english_are_left_out(folders, tmp_path):
    """Of things that the worlds draw otherwise nobody says it, unless a dictionary is asked."""
    recipe = make(folders, tmp_path, make_source(limit=0, groups=("native", "shared")), match="pooled")
    batch = fixed_batch(recipe.source, 8, 0)
    share = sum(english is not None for english in batch.english) / 8
    assert 0 < share < 1
    terms = recipe(batch)
    assert terms["parallel"] == pytest.approx(share, abs=0.3)  # a dropped caption is "" in both
    asked = make_source(groups=("native",), translations=True, limit=16)
    assert asked[0].english is not None
    assert asked.validation[0].english is not None
    recipe.train_parts()
    none = fixed_batch(make_source(groups=("native",), name_colours=False), 2, 3)
    recipe.empty_caption = 0.0
    loss = recipe(none)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None for p in recipe.denoiser.native_text_encoder.parameters())


def test_one_language_alone_is_refused(folders, tmp_path):
    native = make_source(groups=("native",), limit=16, name_colours=False)
    for source in (make_source("en", limit=16), native):
        with pytest.raises(UserError, match="has its caption in English too"):
            make(folders, tmp_path, source)
    assert make_native().text_dim == 48
    with pytest.raises(UserError, match="48 wide and the UNet reads 32"):
        make(folders, tmp_path, native_text_encoder=folders[1])


def test_the_control_keeps_the_english_captions_and_shuffles_the_others(folders, tmp_path):
    recipe = make(folders, tmp_path, shuffle_captions=True, empty_caption=0.0)
    batch = fixed_batch(recipe.source, 16, 0)
    own = list(batch.captions)
    texts = recipe.denoiser.captions.of(batch)
    assert texts != own
    everyone = {recipe.source.caption(i) for i in range(len(recipe.source))}
    assert set(texts) <= everyone
    told = recipe._tell(batch, texts)
    plain = make(folders, tmp_path, empty_caption=0.0)._tell(batch, own)
    torch.testing.assert_close(told.english, plain.english)
    assert not torch.equal(told.text, plain.text)
