"""The recipes on tiny models: what each trains, and that it is the method's loss."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import NATIVE_DIM, make_unet, make_vae

from bdm.data.batch import fixed_batch
from bdm.data.source import UnreadableExample
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.text.english import encode_english
from bdm.text.vocabulary import clip_tokenizer
from bdm.training.recipes.branch import BranchRecipe
from bdm.training.recipes.contrastive import contrastive_loss


@pytest.fixture
def folders(tmp_path, text_encoder, native):
    stock = StableDiffusionPipeline(
        make_vae(), text_encoder, clip_tokenizer(), make_unet(), DDIMScheduler(**SD15_SCHEDULE), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "backbone")
    native.save_pretrained(tmp_path / "native")
    return str(tmp_path / "backbone"), str(tmp_path / "native")


def branch_recipe(folders, **options):
    source = EmojiSource(World(), limit=4, size=64)
    return BranchRecipe(source, *folders, **options).eval()


def test_branch_loss_is_the_papers(folders):
    """eps-MSE with (t, c_en = "", c_native), computed here with the UNet's own arguments."""
    recipe = branch_recipe(folders, empty_caption=0.0)
    for convolution in recipe.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    loss = recipe(fixed_batch(recipe.source, 4, 0))["loss"]
    batch = fixed_batch(recipe.source, 4, 0)
    t = (batch.rand() * 1000).long()
    batch.rand()
    x_0 = recipe.latents(batch)
    eps = batch.randn(*x_0.shape[1:])
    alpha_bar = DDIMScheduler(**SD15_SCHEDULE).alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    down, middle = recipe.branch(x_t, t, recipe.native_text_encoder.encode(batch.captions), return_dict=False)
    recipe.bridge.detach()
    empty = recipe.empty_english.expand(4, -1, -1)
    eps_hat = recipe.unet(
        x_t, t, empty, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    torch.testing.assert_close(loss, (eps_hat - eps).square().mean(), rtol=1e-5, atol=1e-6)
    tokenizer = recipe._components["tokenizer"]
    assert torch.equal(
        recipe.empty_english, encode_english([""], recipe._components["text_encoder"], tokenizer)
    )


def test_cached_moments_and_features_give_the_same_loss(folders):
    plain, cached = branch_recipe(folders), branch_recipe(folders, cache=True)
    cached.branch.load_state_dict(plain.branch.state_dict())
    cached.fill_caches(Accelerator())
    batches = [fixed_batch(recipe.source, 4, 0) for recipe in (plain, cached)]
    assert batches[1].pixels is None
    losses = [recipe(batch)["loss"] for recipe, batch in zip((plain, cached), batches, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def reference_draws(recipe, batch):
    """What the recipe draws for a batch, in its order: timesteps, dropping, latents, noise."""
    t = (batch.rand() * 1000).long()
    batch.rand()
    x_0 = recipe.latents(batch)
    return t, x_0, batch.randn(*x_0.shape[1:])


def test_velocity_and_offset_noise(folders, monkeypatch):
    """The target and the noise are computed here; without offset noise nothing more is drawn."""
    scheduler = DDIMScheduler(**SD15_SCHEDULE | {"prediction_type": "v_prediction"})
    scheduler.save_pretrained(f"{folders[0]}/scheduler")
    recipe = branch_recipe(folders, empty_caption=0.0, offset_noise=0.1)
    assert recipe.schedule.prediction == "v_prediction", "the backbone's"
    monkeypatch.setattr(recipe, "predict", lambda x_t, t, text: x_t)
    batch = fixed_batch(recipe.source, 4, 0)
    t, x_0, eps = reference_draws(recipe, batch)
    eps = eps + 0.1 * batch.randn(4, 1, 1)
    expected = scheduler.add_noise(x_0, eps, t) - scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(recipe(fixed_batch(recipe.source, 4, 0))["loss"], expected.square().mean())
    recipe.offset_noise = 0.0
    left, plain = fixed_batch(recipe.source, 4, 0), fixed_batch(recipe.source, 4, 0)
    recipe(left)
    reference_draws(recipe, plain)
    assert torch.equal(left.rand(), plain.rand())
    with pytest.raises(UserError, match="must predict the same"):
        branch_recipe(folders, prediction="epsilon")


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
    return before, [p.grad.clone() for p in recipe.branch.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("names", "share"), [(["branch"], 0.8), (["decoder"], 0.8), (["branch", "decoder"], 0.6)]
)
def test_checkpointing_keeps_less_and_changes_no_gradient(folders, names, share):
    recipe = branch_recipe(folders)
    recipe.branch.requires_grad_(True).train()
    for convolution in recipe.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    plain, gradients = kept_bytes(recipe)
    recipe.recompute_activations(names)
    less, again = kept_bytes(recipe)
    assert less < share * plain, less / plain
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="knows branch, decoder"):
        recipe.recompute_activations(["encoder"])


def test_frozen_parts_in_low_precision(folders):
    """UNet and text encoders are stored in it, the branch and the VAE are not.

    Loss and gradients stay close.
    """
    full, low = branch_recipe(folders), branch_recipe(folders, frozen_dtype="bf16", grid_prompts=("红灯笼",))
    low.branch.load_state_dict(full.branch.state_dict())
    assert low.unet.dtype == low.native_text_encoder.model.dtype == torch.bfloat16
    assert low.branch.dtype == low.vae.dtype == torch.float32
    losses = []
    for recipe in (full, low):
        recipe.branch.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(recipe(fixed_batch(recipe.source, 4, 0))["loss"])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    ours, theirs = (recipe.branch.controlnet_mid_block.weight.grad for recipe in (low, full))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98
    assert low.grid().width > 32


def test_training_goes_on_from_a_trained_branch(folders, tmp_path):
    first = branch_recipe(folders)
    with torch.no_grad():
        first.branch.controlnet_mid_block.weight.normal_()
    first.save(tmp_path / "branch")
    further = branch_recipe(folders, branch=str(tmp_path / "branch"))
    batches = [fixed_batch(first.source, 2, seed=0) for _ in range(2)]  # a batch's generators serve once
    assert torch.equal(further(batches[0])["loss"], first(batches[1])["loss"])
    with pytest.raises(UserError, match="config.json"):
        branch_recipe(folders, branch=str(tmp_path))


def test_only_the_branch_trains_and_shuffling_changes_captions_only(folders):
    recipe = branch_recipe(folders, shuffle_captions=True)
    assert set(recipe.parts()) == {"branch"}
    batch = fixed_batch(recipe.source, 8, 0)
    shuffled = recipe.caption_of(batch)
    assert shuffled != batch.captions
    everything = [recipe.caption_of(fixed_batch(recipe.source, len(recipe.source), 0))]
    assert sorted(everything[0]) == sorted(recipe.source.caption(i) for i in range(len(recipe.source)))
    assert recipe.branch.config["cross_attention_dim"] == NATIVE_DIM


def test_grid_and_validation_leave_the_bridge_in_place(folders):
    recipe = branch_recipe(folders, grid_prompts=("红灯笼", "月饼"))
    first = recipe.validate()
    assert set(first) == {"t0-250", "t250-500", "t500-750", "t750-1000"}
    assert recipe.grid().width > 64
    assert recipe.validate() == first
    assert recipe.bridge.unet is recipe.unet


def test_contrastive_loss_is_symmetric_infonce():
    similarity = torch.randn(3, 3)
    rows, columns = similarity.log_softmax(1).diagonal(), similarity.log_softmax(0).diagonal()
    expected = -(rows.mean() + columns.mean()) / 2
    torch.testing.assert_close(contrastive_loss(similarity, ["a", "b", "c"]), expected)
    same = torch.zeros(2, 2)
    torch.testing.assert_close(contrastive_loss(same, ["a", "a"]), torch.tensor(2.0).log())


def community(kind, folder, tmp_path, **changes):
    """A recipe of a community plug-in, stepped a few times and saved."""
    from bdm.emoji.world import EmojiSource, World
    from bdm.training.recipes import community, distill

    classes = {
        "checkpoint": community.CheckpointRecipe,
        "lora": community.LoraRecipe,
        "embedding": community.EmbeddingRecipe,
        "controlnet": community.ControlNetRecipe,
        "lcm_lora": distill.LcmLoraRecipe,
    }
    source = EmojiSource(World(), language="en", groups=("shared",), limit=4, size=64)
    recipe = classes[kind](source, backbone=folder, **changes)
    recipe.requires_grad_(False)
    parameters = [p.requires_grad_(True) for part in recipe.parts().values() for p in part.parameters()]
    frozen = {name: p.detach().clone() for name, p in recipe.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for i in range(2):
        optimizer.zero_grad()
        recipe(fixed_batch(source, 4, i))["loss"].backward()
        optimizer.step()
    for name, parameter in recipe.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    recipe.eval().save(tmp_path / kind)
    return recipe


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([5, 700])


@pytest.mark.parametrize("kind", ["checkpoint", "lora", "lcm_lora", "embedding", "controlnet"])
def test_what_a_community_recipe_writes_acts_as_in_training(folders, pipe, tmp_path, inputs, kind):
    """The saved file, attached as a plug-in to the same backbone, predicts what the recipe's own networks
    predict.
    """
    from bdm.models.backbone import load_backbone
    from bdm.plugins import Plugins

    changes = {
        "lora": {"trigger": "ink"},
        "embedding": {"trigger": "duskmood"},
        "controlnet": {"widths": (8, 16, 16, 32)},
    }
    recipe = community(kind, folders[0], tmp_path, **changes.get(kind, {}))
    captions = [recipe._captioned("a cat")] * 2
    path = next(iter((tmp_path / kind).iterdir())) if kind != "controlnet" else tmp_path / kind
    backbone = load_backbone(folders[0])
    plugins = Plugins(backbone)
    before = backbone.unet(
        *inputs, encode_english(captions, backbone.text_encoder, backbone.tokenizer)
    ).sample
    plugins.attach(path)
    text = encode_english(captions, backbone.text_encoder, backbone.tokenizer)
    with torch.no_grad():
        if kind == "controlnet":
            control = torch.rand(2, 3, 64, 64).round()
            recipe._edges = control
            with plugins.during_call(control):
                ours = backbone.unet(*inputs, text).sample
        else:
            ours = backbone.unet(*inputs, text).sample
        theirs = recipe.predict(*inputs, recipe.encode_texts(captions))
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)  # files hold half precision
    assert (ours - before).abs().max() > 0.05
    assert recipe.sample(
        ["a cat"] if kind != "controlnet" else [recipe.source.validation.caption(0)], 0
    ).shape == (1, 3, 64, 64)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_distillation_follows_the_schedulers_of_diffusers(folders, prediction):
    """The teacher's step is DDIM's on the guided prediction.

    The end is what LCM's sampler makes of a prediction.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    from bdm.emoji.world import EmojiSource, World
    from bdm.models.noise_schedule import SD15_SCHEDULE, NoiseSchedule
    from bdm.training.recipes.distill import LcmLoraRecipe

    source = EmojiSource(World(), language="en", groups=("shared",), limit=4, size=64)
    recipe = LcmLoraRecipe(source, backbone=folders[0]).eval()
    recipe.schedule = NoiseSchedule(prediction)
    settings = {**SD15_SCHEDULE, "prediction_type": prediction}
    x, text, empty = (
        torch.randn(3, 4, 8, 8),
        recipe.encode_texts(["a cat"] * 3),
        recipe.encode_texts([""] * 3),
    )
    t = torch.tensor([19, 499, 999])
    scale = torch.tensor([1.0, 2.0, 3.0])
    ddim, lcm = DDIMScheduler(**settings), LCMScheduler(**settings)
    ddim.set_timesteps(50)
    lcm.set_timesteps(timesteps=[999, 499, 19])
    ours = recipe.teach(x, t, (t - 20).clamp(min=0), text, empty, scale)
    ends = recipe.end(x, t, text)
    for i, step in enumerate(t.tolist()):
        row = slice(i, i + 1)
        bare, told = (
            recipe.unet(x[row], step, words[row]).sample for words in (empty, text)
        )  # a fresh LoRA changes nothing
        guided = bare + scale[i] * (told - bare)
        torch.testing.assert_close(
            ours[row], ddim.step(guided, step, x[row]).prev_sample, atol=1e-4, rtol=1e-4
        )
        lcm._step_index = lcm.index_for_timestep(step)
        torch.testing.assert_close(ends[row], lcm.step(told, step, x[row]).denoised, atol=1e-4, rtol=1e-4)


def test_arguments_of_shipped_configurations_are_the_models():
    from bdm.config import RunConfig, read_config
    from bdm.training.recipes.build import check_model_arguments

    folder = Path(__file__).parents[3] / "configs" / "emoji"
    for name in ("autoencoder", "backbone", "english_clip", "chinese_clip"):
        check_model_arguments(read_config(folder / f"{name}.yaml", [], RunConfig).recipe)


def test_the_backbone_recipe_reads_a_vae_and_the_text_part_of_a_clip(folders, tmp_path, text_encoder):
    """From a whole CLIP's folder, as the contrastive recipe writes it.

    The grid and the saved pipeline use the same parts.
    """
    from transformers import CLIPConfig, CLIPModel

    from bdm.models.backbone import load_backbone
    from bdm.training.recipes.backbone import BackboneRecipe

    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    clip = CLIPModel(
        CLIPConfig(text_config=text_encoder.config.to_dict(), vision_config=vision, projection_dim=8)
    ).eval()
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip/card.json").write_text("{}")
    source = EmojiSource(World(), language="en", limit=4, size=64)
    unet = {
        key: make_unet().config[key]
        for key in ("sample_size", "block_out_channels", "cross_attention_dim", "norm_num_groups")
    }
    recipe = BackboneRecipe(
        source, f"{folders[0]}/vae", str(tmp_path / "clip"), unet, grid_prompts=("a cat", "a dog")
    ).eval()
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    expected = clip.text_model(ids).last_hidden_state
    assert torch.equal(recipe.text_encoder(ids).last_hidden_state, expected)
    assert torch.equal(
        recipe.vae.state_dict()["quant_conv.weight"],
        load_backbone(folders[0]).vae.state_dict()["quant_conv.weight"],
    )
    first, alone = recipe.sample(["a cat", "a dog"], 3), recipe.sample(["a dog"], 4)
    torch.testing.assert_close(first[1:], alone, atol=1e-4, rtol=1e-4)
    recipe.save(tmp_path / "out")
    assert (tmp_path / "out/text_encoder/card.json").is_file()
    assert torch.equal(load_backbone(tmp_path / "out").text_encoder(ids).last_hidden_state, expected)
    with pytest.raises(UserError, match="runs/emoji/vae: no such folder"):
        BackboneRecipe(source, "runs/emoji/vae", str(tmp_path / "clip"), unet)
    with pytest.raises(UserError, match=r"text_encoder is no SD1.5 network"):
        BackboneRecipe(source, f"{folders[0]}/vae", f"{folders[0]}/vae", unet)


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


@pytest.mark.parametrize(("trigger", "told"), [("ink", "ink"), ("", "")])
def test_a_dropped_caption_keeps_the_trigger(folders, monkeypatch, trigger, told):
    from bdm.training.recipes.community import CheckpointRecipe

    source = EmojiSource(World(), language="en", limit=2, size=64)
    recipe = CheckpointRecipe(source, backbone=folders[0], trigger=trigger, empty_caption=1.0).eval()
    heard = []
    monkeypatch.setattr(
        recipe, "encode_texts", lambda texts, own=recipe.encode_texts: heard.append(list(texts)) or own(texts)
    )
    recipe(fixed_batch(source, 3, seed=0))
    assert heard == [[told] * 3]


def test_a_grid_leaves_out_examples_without_a_caption(folders):
    from bdm.training.recipes.community import ControlNetRecipe
    from bdm.training.recipes.denoising import spread_captions

    gaps = Gaps(World(), language="en", limit=2, size=64)
    plain = EmojiSource(World(), language="en", limit=2, size=64)
    assert spread_captions(gaps, 10**6) == [*dict.fromkeys(plain.caption(i) for i in range(1, len(plain), 2))]
    assert len(set(spread_captions(plain, 10**6))) == len(spread_captions(plain, 10**6))
    assert spread_captions(gaps, 1) == []
    recipe = ControlNetRecipe(plain, backbone=folders[0], widths=(8, 16, 16, 32)).eval()
    recipe.source = type("Held", (), {"validation": gaps})()
    recipe.grid_size = len(gaps) // 8
    assert recipe.grid().width > 64
    recipe.grid_size = 1
    assert recipe.grid() is None, "no caption, no picture"
