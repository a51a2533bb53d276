"""The branch recipe is the paper's."""

import gc

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import NATIVE_DIM, make_branch, make_unet
from tiny_recipes import make_recipe

from bdm.data.batch import fixed_batch
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.speed import packing
from bdm.text.english import encode_english
from bdm.training.recipes.latents import draw_latents


def make(folders, **options):
    return make_recipe("branch", folders, **options)


def test_its_loss_is_the_papers(folders):
    """eps-MSE with (t, c_en = "", c_native), computed here with the UNet's own arguments."""
    recipe = make(folders, empty_caption=0.0)
    denoiser = recipe.denoiser
    for convolution in denoiser.branch.controlnet_down_blocks:
        torch.nn.init.normal_(convolution.weight, std=0.2)
    loss = recipe(fixed_batch(recipe.source, 4, 0))["loss"]
    batch = fixed_batch(recipe.source, 4, 0)
    t = (batch.rand() * 1000).long()
    batch.rand()
    x_0 = draw_latents(recipe.vae, batch)
    eps = batch.randn(*x_0.shape[1:])
    alpha_bar = DDIMScheduler(**SD15_SCHEDULE).alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    native = denoiser.native_text_encoder.encode(batch.captions)
    down, middle = denoiser.branch(x_t, t, native, return_dict=False)
    stock = load_backbone(folders[0])
    empty = encode_english([""], stock.text_encoder, stock.tokenizer)
    assert torch.equal(denoiser.empty_english, empty)
    eps_hat = stock.unet(
        x_t,
        t,
        empty.expand(4, -1, -1),
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    torch.testing.assert_close(loss, (eps_hat - eps).square().mean(), rtol=1e-5, atol=1e-6)


def test_a_backbone_may_be_given_ready_to_be_trained(folders):
    """It is frozen, and nothing recorded before keeps a second step from its gradients."""
    stock = load_backbone(folders[0])
    for part in (stock.unet, stock.text_encoder, stock.vae):
        part.requires_grad_(True)
    recipe = make((stock, folders[1]))
    recipe.train_parts()
    for step in range(2):
        recipe(fixed_batch(recipe.source, 2, step))["loss"].backward()
    assert not any(p.requires_grad for part in (stock.unet, stock.text_encoder) for p in part.parameters())


def test_a_recipe_that_is_gone_leaves_the_backbone_free(folders):
    stock = load_backbone(folders[0])
    recipe = make((stock, folders[1]))
    with pytest.raises(UserError, match="has a bridge already"):
        make((stock, folders[1]))
    recipe(fixed_batch(recipe.source, 1, 0))
    del recipe
    gc.collect()
    assert not any(module._forward_pre_hooks for module in stock.unet.modules())
    make((stock, folders[1]))


def test_a_backbone_without_an_english_text_encoder_is_refused(folders):
    stock = load_backbone(folders[0])
    stock.text_encoder = None
    with pytest.raises(UserError, match="has no English text encoder"):
        make((stock, folders[1]), bilingual=0.5)
    assert not any(module._forward_pre_hooks for module in stock.unet.modules())


def test_frozen_parts_in_low_precision(folders):
    """UNet and text encoders are stored in it, the branch and the VAE are not.

    Loss and gradients stay close.
    """
    full, low = make(folders), make(folders, frozen_dtype="bf16", grid_prompts=("红灯笼",))
    low.denoiser.branch.load_state_dict(full.denoiser.branch.state_dict())
    assert low.denoiser.unet.dtype == low.denoiser.native_text_encoder.model.dtype == torch.bfloat16
    assert low.denoiser.branch.dtype == low.vae.dtype == torch.float32
    losses = []
    for recipe in (full, low):
        recipe.denoiser.branch.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(recipe(fixed_batch(recipe.source, 4, 0))["loss"])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    ours, theirs = (recipe.denoiser.branch.controlnet_mid_block.weight.grad for recipe in (low, full))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98
    assert low.grid().width > 32


def test_training_goes_on_from_a_trained_branch(folders, tmp_path):
    first = make(folders)
    with torch.no_grad():
        first.denoiser.branch.controlnet_mid_block.weight.normal_()
    first.save(tmp_path / "branch")
    further = make(folders, branch=str(tmp_path / "branch"))
    batches = [fixed_batch(first.source, 2, seed=0) for _ in range(2)]  # a batch's generators serve once
    torch.testing.assert_close(further(batches[0])["loss"], first(batches[1])["loss"], rtol=3e-5, atol=1e-5)
    ours, theirs = further.denoiser.branch.state_dict(), first.denoiser.branch.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="config.json"):
        make(folders, branch=str(tmp_path))


def test_a_trained_branch_takes_another_text_encoder_when_asked(folders, tmp_path):
    """What reads the text starts anew, every other weight goes on."""
    trained = make_branch(make_unet(), width=NATIVE_DIM + 16)
    trained.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"width 64, .* is 48; .*fresh_text: true"):
        make(folders, branch=str(tmp_path))
    recipe = make(folders, branch=str(tmp_path), fresh_text=True)
    own, old = recipe.denoiser.branch.state_dict(), trained.state_dict()
    moved = {name for name in own if not torch.equal(own[name], old[name])}
    readers = {name for name in own if "attn2.to_k" in name or "attn2.to_v" in name}
    assert moved == readers
    recipe(fixed_batch(recipe.source, 2, 0))["loss"].backward()
    assert all(p.grad is not None for p in recipe.denoiser.branch.parameters())
    with pytest.raises(UserError, match="none is given"):
        make(folders, fresh_text=True)


def test_only_the_branch_trains_and_shuffling_changes_captions_only(folders):
    recipe = make(folders, shuffle_captions=True)
    assert set(recipe.parts()) == {"branch"}
    captions = recipe.denoiser.captions
    batch = fixed_batch(recipe.source, 8, 0)
    assert captions.of(batch) != batch.captions
    everything = captions.of(fixed_batch(recipe.source, len(recipe.source), 0))
    assert sorted(everything) == sorted(recipe.source.caption(i) for i in range(len(recipe.source)))
    assert recipe.denoiser.branch.config["cross_attention_dim"] == NATIVE_DIM


def test_grid_and_validation_leave_the_bridge_in_place(folders):
    recipe = make(folders, grid_prompts=("红灯笼", "月饼"))
    first = recipe.validate()
    assert recipe.grid().width > 64
    assert recipe.validate() == first
    assert recipe.denoiser.bridge.unet is recipe.denoiser.unet


def test_a_grid_moves_nothing_that_the_optimizer_owns(folders):
    """Layers that are large enough to be packed keep their weights in place while a grid is drawn."""
    make_unet(block_out_channels=(32, 64, 64, 64)).save_pretrained(f"{folders[0]}/unet")
    recipe = make(folders, grid_prompts=("红灯笼",))
    recipe.train_parts()
    recipe.eval()
    watched = {"branch": recipe.denoiser.branch, "unet": recipe.denoiser.unet}
    assert max(p.numel() for p in recipe.denoiser.branch.parameters()) > packing.LEAST_CONVOLUTION

    def places(module):
        return [(type(p), p.data_ptr(), p.untyped_storage().nbytes()) for p in module.parameters()]

    before, seen = {name: places(module) for name, module in watched.items()}, []
    for name, module in watched.items():
        module.register_forward_hook(lambda module, *_, name=name: seen.append((name, places(module))))
    recipe.grid()
    assert {name for name, _ in seen} == set(watched)
    assert all(found == before[name] for name, found in seen)
    assert {name: places(module) for name, module in watched.items()} == before


def test_states_name_their_weights_as_ever(folders):
    """What a run has saved goes on: parts by name, and in each the names of the model's own file."""
    recipe = make(folders)
    assert list(recipe.parts()) == ["branch"]
    names = set(recipe.parts()["branch"].state_dict())
    assert {"conv_in.weight", "controlnet_down_blocks.0.weight", "controlnet_mid_block.bias"} <= names
    assert set(recipe.models()) == {"vae", "unet", "native_text_encoder", "branch"}
