"""A branch trained on a pool of backbones and beside English words."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_recipes import make_recipe

from bdm import Bridge, NativeCondition
from bdm.data.batch import fixed_batch
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.plugins import Plugins
from bdm.text.english import encode_english
from bdm.training.recipes.latents import draw_latents
from bdm.training.recipes.pool import BackbonePool, Variation
from bdm.training.recipes.robust import RobustBranchRecipe


@pytest.fixture
def lora(folders, tmp_path):
    """A LoRA that changes the UNet and the English text encoder of the tiny backbone."""
    stock = load_backbone(folders[0])
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    layers = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q": stock.unet.get_parameter(
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
        ),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": next(
            weight
            for name, weight in stock.text_encoder.named_parameters()
            if "layers.0.mlp.fc1.weight" in name
        ),
    }
    for key, weight in layers.items():
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "ink.safetensors"
    save_file(tensors, path)
    return path


def weights(stock):
    return {
        (part, name): value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(stock, part).state_dict().items()
    }


def make(folders, lora=None, **options):
    pool = (
        {"files": [{"file": str(lora), "words": "ink"}], "share": 1.0, "strength": (1.0, 1.0)}
        if lora
        else None
    )
    recipe = make_recipe("branch", folders, pool=pool and {**pool, **options.pop("pool", {})}, **options)
    assert isinstance(recipe, RobustBranchRecipe) == bool(
        lora or options.get("bilingual") or options.get("distill")
    )
    for convolution in recipe.denoiser.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return recipe


def told(batch, **changes):
    return replace(batch, **changes)


def test_a_variation_is_what_attaching_its_file_makes(folders, lora):
    stock, plugged = load_backbone(folders[0]), load_backbone(folders[0])
    pool, before = BackbonePool(stock, [lora]), weights(stock)
    Plugins(plugged).attach(lora, strength=0.6)
    pool.put(Variation(((0, 0.6),)))
    for place, value in weights(plugged).items():
        torch.testing.assert_close(weights(stock)[place], value, rtol=1e-5, atol=1e-6)
    with pool.lifted():
        assert all(torch.equal(value, before[place]) for place, value in weights(stock).items())
    assert pool.changes_words(Variation(((0, 0.6),)))
    pool.lift()
    assert all(torch.equal(value, before[place]) for place, value in weights(stock).items())


def test_random_changes_are_low_rank_of_the_size_asked_for_and_repeat(folders):
    stock = load_backbone(folders[0])
    pool, before = BackbonePool(stock, rank=2), weights(stock)
    pool.put(Variation(seed=5, strength=0.2))
    first = weights(stock)
    changed = [place for place in before if not torch.equal(first[place], before[place])]
    assert len(changed) > 50
    for place in changed:
        change = (first[place] - before[place]).flatten(1)
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    ratios = [(first[p] - before[p]).norm() / before[p].norm() for p in changed]
    assert 0.15 < sum(ratios) / len(ratios) < 0.25
    pool.put(Variation(seed=5, strength=0.2))
    assert all(torch.equal(value, first[place]) for place, value in weights(stock).items())


def test_what_is_drawn_depends_on_the_generator_alone(folders, lora):
    pool = BackbonePool(load_backbone(folders[0]), [lora], rank=2, share=0.5)
    drawn = [pool.draw(torch.Generator().manual_seed(i)) for i in range(60)]
    assert drawn == [pool.draw(torch.Generator().manual_seed(i)) for i in range(60)]
    assert 15 < sum(variation is None for variation in drawn) < 45
    some = [variation for variation in drawn if variation]
    assert {(bool(v.members), v.seed is not None) for v in some} == {
        (True, True),
        (True, False),
        (False, True),
    }


@pytest.mark.parametrize("target", ["caption", "shift", "data"])
def test_targets_on_another_backbone(folders, lora, target):
    """The loss against one computed from separate passes of a backbone that the file is attached to."""
    recipe = make(folders, lora, empty_caption=0.0, pool={"target": target})
    batch = fixed_batch(recipe.source, 4, 0)
    english = ["dumpling", None, "a tea pot", None]
    loss = recipe(told(batch, english=english))["loss"]

    again = fixed_batch(recipe.source, 4, 0)
    t = recipe.loss.draw_timesteps(again)
    recipe._pool.draw(again.generators[0])
    again.rand()
    x_0 = draw_latents(recipe.vae, again)
    eps = again.randn(*x_0.shape[1:])
    x_t = recipe.loss.schedule.add_noise(x_0, eps, t)
    recipe._pool.lift()
    own, plugged = load_backbone(folders[0]), load_backbone(folders[0])
    Plugins(plugged).attach(lora)

    @torch.no_grad()
    def answer(stock, texts):
        return stock.unet(x_t, t, encode_english(texts, stock.text_encoder, stock.tokenizer)).sample

    shifted = eps + answer(plugged, ["ink"] * 4) - answer(own, [""] * 4)
    taught = answer(plugged, [f"{text}, ink" for text in english])
    knows = torch.tensor([text is not None for text in english]).view(-1, 1, 1, 1)
    expected = {"data": eps, "shift": shifted, "caption": torch.where(knows, taught, shifted)}[target]
    recipe.denoiser.bridge.detach()
    native = recipe.denoiser.native_text_encoder.encode(again.captions)
    with Bridge(recipe.denoiser.branch).attach(plugged.unet).condition(NativeCondition(native)):
        ink = encode_english(["ink"] * 4, plugged.text_encoder, plugged.tokenizer)
        predicted = plugged.unet(x_t, t, ink).sample
    torch.testing.assert_close(loss, (predicted - expected).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distill", [False, True])
def test_the_backbone_itself_teaches_what_it_knows_in_english(folders, distill):
    recipe = make(folders, empty_caption=0.0, distill=distill)
    batch = fixed_batch(recipe.source, 4, 0)
    english = ["dumpling", None, "a tea pot", None]
    loss = recipe(told(batch, english=english))["loss"]

    again = fixed_batch(recipe.source, 4, 0)
    t = recipe.loss.draw_timesteps(again)
    again.rand()
    x_0 = draw_latents(recipe.vae, again)
    eps = again.randn(*x_0.shape[1:])
    x_t = recipe.loss.schedule.add_noise(x_0, eps, t)
    own = load_backbone(folders[0])
    texts = encode_english([text or "" for text in english], own.text_encoder, own.tokenizer)
    with torch.no_grad():
        taught = own.unet(x_t, t, texts).sample
    knows = torch.tensor([distill and text is not None for text in english]).view(-1, 1, 1, 1)
    native = recipe.denoiser.native_text_encoder.encode(again.captions)
    predicted = recipe.denoiser.predict(x_t, t, native)
    expected = (predicted - torch.where(knows, taught, eps)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_a_backbone_that_has_the_file_for_good(folders, lora):
    """The variation stays until the backward pass is done."""
    recipe = make(folders, lora, empty_caption=0.0, pool={"target": "data"})
    plugged = load_backbone(folders[0])
    Plugins(plugged).attach(lora)
    never = {"rank": 1, "share": 0.0}
    other = make_recipe("branch", (plugged, folders[1]), pool=never, empty_caption=0.0)
    other.denoiser.branch.load_state_dict(recipe.denoiser.branch.state_dict())
    other._pool.words = lambda variation: "ink"
    for each in (recipe, other):
        each.train_parts()
        each(fixed_batch(recipe.source, 2, 0))["loss"].backward()
    ours, theirs = (dict(each.denoiser.branch.named_parameters()) for each in (recipe, other))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_validation_and_pictures_are_of_the_backbone_itself(folders, lora, tmp_path):
    recipe, plain = make(folders, lora), make(folders)
    recipe(fixed_batch(recipe.source, 2, 0))
    assert recipe.validate() == pytest.approx(plain.validate(), rel=1e-4)
    recipe.save(tmp_path / "saved")


def test_bilingual_samples_are_told_both(folders, monkeypatch):
    recipe = make(folders, bilingual=1.0, empty_caption=0.0)
    seen = []
    predict = recipe.denoiser.predict
    monkeypatch.setattr(
        recipe.denoiser, "predict", lambda *a, **k: seen.append((a[2], k["english"])) or predict(*a, **k)
    )
    batch = fixed_batch(recipe.source, 2, 0)
    recipe(told(batch, bilingual=[("龙", "blue background"), None]))
    native = recipe.denoiser.native_text_encoder.encode(["龙", batch.captions[1]])
    torch.testing.assert_close(seen[0][0], native)
    assert torch.equal(seen[0][1], recipe._encode_english(["blue background", ""]))


def test_the_backbone_is_itself_when_a_run_is_done(folders, lora):
    stock = load_backbone(folders[0])
    before = weights(stock)
    recipe = make((stock, folders[1]), lora)
    recipe(fixed_batch(recipe.source, 2, 0))
    assert not all(torch.equal(value, before[place]) for place, value in weights(stock).items())
    recipe.finish()
    assert all(torch.equal(value, before[place]) for place, value in weights(stock).items())


@pytest.mark.parametrize("cache", [True, False])
def test_english_captions_stay_in_memory_only_where_the_native_ones_do(folders, cache):
    recipe = make(folders, bilingual=1.0, empty_caption=0.0, cache=cache)
    recipe(told(fixed_batch(recipe.source, 2, 0), bilingual=[("龙", "blue background"), None]))
    assert ("blue background" in recipe._english.kept) == ("龙" in recipe.features.kept) == cache


@pytest.mark.gpu
def test_files_and_random_changes_meet_on_the_backbones_device(folders, lora):
    stock = load_backbone(folders[0])
    pool = BackbonePool(stock, [lora], rank=2)
    pool.put(Variation(((0, 0.6),), seed=5, strength=0.2))
    expected = weights(stock)
    pool.lift()
    stock.unet.to("cuda")
    stock.text_encoder.to("cuda")
    pool.put(Variation(((0, 0.6),), seed=5, strength=0.2))
    for place, value in weights(stock).items():
        torch.testing.assert_close(value.cpu(), expected[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"files": []}, "neither files nor random changes"),
        ({"files": ["nowhere.safetensors"]}, "no such file"),
    ],
)
def test_pools_that_are_none(folders, pool, said):
    with pytest.raises(UserError, match=said):
        make_recipe("branch", folders, pool=pool)


def test_a_pool_refuses_what_changes_no_weights_and_leaves_the_backbone_alone(folders, tmp_path):
    stock = load_backbone(folders[0])
    before = weights(stock)
    path = tmp_path / "mood.pt"
    width = stock.text_encoder.config.hidden_size
    torch.save({"string_to_param": {"*": torch.randn(2, width)}}, path)
    with pytest.raises(UserError, match="takes those that change the"):
        BackbonePool(stock, [path])
    assert all(torch.equal(value, before[place]) for place, value in weights(stock).items())
