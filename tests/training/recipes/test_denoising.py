"""What all denoising recipes have from one place: texts, latents, the loss, its validation and the grid."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from tiny_recipes import KINDS, make_recipe, make_source

from bdm.data.batch import Batch, fixed_batch
from bdm.data.source import UnreadableExample
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.training.recipes.captions import TextFeatures
from bdm.training.recipes.latents import draw_latents
from bdm.training.recipes.preview import spread_captions


def draws(recipe, batch):
    """What a recipe draws for a batch, in its order: timesteps, dropping, latents, noise."""
    t = (batch.rand() * 1000).long()
    batch.rand()
    x_0 = draw_latents(recipe.vae, batch)
    return t, x_0, batch.randn(*x_0.shape[1:])


def patch_predict(recipe, monkeypatch, predict):
    monkeypatch.setattr(recipe.denoiser, "predict", lambda x_t, t, text, **given: predict(x_t, t))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lcm_lora"])
def test_the_loss_with_a_weight_is_weights_times_errors(folders, monkeypatch, kind):
    """Of every recipe: weights, timesteps and offset noise of the configuration take part."""
    recipe = make_recipe(kind, folders, loss_weight="velocity", offset_noise=0.1)
    patch_predict(recipe, monkeypatch, lambda x_t, t: 0.5 * x_t)
    loss = recipe(fixed_batch(recipe.source, 4, 0))["loss"]
    batch = fixed_batch(recipe.source, 4, 0)
    t, x_0, eps = draws(recipe, batch)
    eps = eps + 0.1 * batch.randn(4, 1, 1)
    scheduler = DDIMScheduler(**SD15_SCHEDULE)
    errors = (0.5 * scheduler.add_noise(x_0, eps, t) - eps).square().mean((1, 2, 3))
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weights = 1 + 1 / snr
    torch.testing.assert_close(loss, (weights * errors).mean(), rtol=1e-4, atol=1e-5)
    assert (loss - errors.mean()).abs() > 0.1


@pytest.mark.parametrize("kind", ["branch", "lcm_lora"])
def test_timesteps_are_of_the_density(folders, monkeypatch, kind):
    recipe = make_recipe(kind, folders, timesteps="high_noise")
    seen = []
    monkeypatch.setattr(recipe.loss, "error", lambda told, x_0, t, draws: seen.append(t) or t * 0.0)
    recipe(fixed_batch(recipe.source, 4, 0))
    batch = fixed_batch(recipe.source, 4, 0)
    uniform = (batch.rand() * 1000).long()
    assert (seen[0] > uniform).all(), "a density that rises puts every timestep later"


def test_what_a_velocity_backbone_predicts_is_inherited(folders, monkeypatch):
    scheduler = DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": "v_prediction"})
    scheduler.save_pretrained(f"{folders[0]}/scheduler")
    recipe = make_recipe("branch", folders)
    patch_predict(recipe, monkeypatch, lambda x_t, t: x_t)
    t, x_0, eps = draws(recipe, fixed_batch(recipe.source, 4, 0))
    expected = scheduler.add_noise(x_0, eps, t) - scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(recipe(fixed_batch(recipe.source, 4, 0))["loss"], expected.square().mean())
    with pytest.raises(UserError, match="must predict the same"):
        make_recipe("branch", folders, prediction="epsilon")


def test_without_offset_noise_nothing_more_is_drawn(folders):
    recipe = make_recipe("branch", folders)
    left, plain = fixed_batch(recipe.source, 4, 0), fixed_batch(recipe.source, 4, 0)
    recipe(left)
    draws(recipe, plain)
    assert torch.equal(left.rand(), plain.rand())


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_captions_are_dropped_with_their_share(folders, monkeypatch, share):
    count, heard = 10_000, []
    recipe = make_recipe("branch", folders, empty_caption=share)
    patch_predict(recipe, monkeypatch, lambda x_t, t: x_t)
    features = torch.zeros(count, 1, 1)
    monkeypatch.setattr(recipe.features, "encode", lambda texts: heard.extend(texts) or features)
    recipe(
        Batch(
            pixels=None,
            moments=torch.zeros(count, 8, 1, 1),
            captions=["灯笼"] * count,
            prepared_text=None,
            indices=list(range(count)),
            generators=[torch.Generator().manual_seed(i) for i in range(count)],
        )
    )
    assert set(heard) <= {"", "灯笼"}
    assert heard.count("") / count == pytest.approx(share, abs=0.01 if 0 < share < 1 else 0)


def test_validation_reads_held_out_examples_alone(folders):
    class Held:
        """Examples for validation beside others for training."""

        def __init__(self, train, validation):
            self.train, self.validation = train, validation

        def __getattr__(self, name):
            return getattr(self.train, name)

        def __len__(self):
            return len(self.train)

        def __getitem__(self, index):
            return self.train[index]

    one, other = make_source(groups=("native",)), make_source(groups=("shared",))
    recipe = make_recipe("branch", folders, Held(one, one))
    for convolution in recipe.denoiser.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    before = recipe.validate()
    recipe.source = Held(other, one)
    assert recipe.validate() == before
    recipe.source = Held(one, other)
    after = recipe.validate()
    assert all(after[name] != before[name] for name in before)


def test_each_bucket_of_the_validation_has_its_timesteps(folders, monkeypatch):
    recipe = make_recipe("branch", folders)
    seen = []
    patch_predict(recipe, monkeypatch, lambda x_t, t: seen.append(t) or x_t)
    names = list(recipe.validate())
    assert names == ["t0-250", "t250-500", "t500-750", "t750-1000"]
    for name, t in zip(names, seen, strict=True):
        low, high = map(int, name[1:].split("-"))
        assert low <= t.min() < t.max() < high


@pytest.mark.parametrize("kind", ["branch", "checkpoint"])
def test_cached_moments_and_features_give_the_same_loss(folders, kind):
    plain, cached = make_recipe(kind, folders), make_recipe(kind, folders, cache=True)
    cached.denoiser.load_state_dict(plain.denoiser.state_dict())
    cached.requires_grad_(False)
    cached.fill_caches(Accelerator())
    batches = [fixed_batch(recipe.source, 4, 0) for recipe in (plain, cached)]
    assert batches[1].pixels is None
    losses = [recipe(batch)["loss"] for recipe, batch in zip((plain, cached), batches, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert cached.features.kept
    assert not plain.features.kept


@pytest.mark.parametrize("first", ["training", "validation"])
def test_features_of_an_encoder_that_trains_are_not_kept(first):
    """Nor those that it makes in validation, where nothing has a gradient."""
    weight = torch.nn.Parameter(torch.ones(()))
    features = TextFeatures(lambda texts: weight * torch.ones(len(texts), 2, 3), keep=True)
    with torch.set_grad_enabled(first == "training"):
        features(["a"])
    with torch.no_grad():
        weight += 1
    made = features(["a"])
    assert made.unique().tolist() == [2.0]
    made.sum().backward()
    assert weight.grad == 6


def test_kept_features_do_not_depend_on_when_a_caption_is_met():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        return torch.zeros(len(texts), 2, 3)

    features = TextFeatures(encode, keep=True)
    features(["a", "b", "a"])
    features(["b"])
    assert sorted(calls) == [[""], ["a"], ["b"]], "the first asks whether the encoder trains"


@pytest.mark.parametrize(
    ("names", "share"), [(["branch"], 0.8), (["decoder"], 0.8), (["branch", "decoder"], 0.6)]
)
def test_recomputed_activations_keep_less_and_change_no_gradient(folders, names, share):
    recipe = make_recipe("branch", folders)
    recipe.denoiser.branch.requires_grad_(True).train()
    for convolution in recipe.denoiser.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    plain, gradients = kept_bytes(recipe)
    recipe.recompute_activations(names)
    less, again = kept_bytes(recipe)
    assert less < share * plain, less / plain
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="knows branch, decoder"):
        recipe.recompute_activations(["encoder"])


def kept_bytes(recipe):
    """Bytes that autograd keeps for the backward pass of a batch, and the branch's gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    recipe.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = recipe(fixed_batch(recipe.source, 4, 0))["loss"]
    before = sum(kept.values())
    loss.backward()
    return before, [p.grad.clone() for p in recipe.denoiser.branch.parameters() if p.grad is not None]


class Gaps(EmojiSource):
    """Some of its examples have no caption, some no picture."""

    def caption(self, index):
        if index % 2 == 0:
            raise UnreadableExample(str(index), "no caption", "caption")
        return super().caption(index)

    def __getitem__(self, index):
        if index % 3 == 1:
            raise UnreadableExample(str(index), "damaged")
        return super().__getitem__(index)


def test_a_grid_leaves_out_examples_without_a_caption(folders):
    gaps = Gaps(World(), language="en", limit=2, size=64)
    plain = make_source("en", limit=2)
    assert spread_captions(gaps, 10**6) == [*dict.fromkeys(plain.caption(i) for i in range(1, len(plain), 2))]
    assert len(set(spread_captions(plain, 10**6))) == len(spread_captions(plain, 10**6))
    assert spread_captions(gaps, 1) == []
    recipe = make_recipe("controlnet", folders, plain)
    recipe.source = type("Held", (), {"validation": gaps})()
    recipe.grid_size = len(gaps) // 8
    assert recipe.grid().width > 64
    recipe.grid_size = 1
    assert recipe.grid() is None, "no caption, no picture"
