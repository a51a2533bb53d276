"""A backbone of one's own from parts that were trained before."""

import pytest
import torch
from tiny_recipes import make_recipe, make_source, small_unet
from transformers import CLIPConfig, CLIPModel

from bdm.data.batch import fixed_batch
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.training.recipes.backbone import backbone_recipe


@pytest.fixture
def clip(tmp_path, text_encoder):
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
    return clip


def test_it_reads_a_vae_and_the_text_part_of_a_clip(folders, tmp_path, clip):
    """From a whole CLIP's folder, as the contrastive recipe writes it.

    The grid and the saved pipeline use the same parts.
    """
    source = make_source("en")
    unet = small_unet()
    recipe = backbone_recipe(source, f"{folders[0]}/vae", str(tmp_path / "clip"), unet).eval()
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    expected = clip.text_model(ids).last_hidden_state
    torch.testing.assert_close(recipe.denoiser.text_encoder(ids).last_hidden_state, expected)
    assert torch.equal(
        recipe.vae.state_dict()["quant_conv.weight"],
        load_backbone(folders[0]).vae.state_dict()["quant_conv.weight"],
    )
    draw = recipe.denoiser.preview.draw
    first, alone = draw(["a cat", "a dog"], 4.0, 3, source), draw(["a dog"], 4.0, 4, source)
    torch.testing.assert_close(first[1:], alone, atol=1e-4, rtol=1e-4)
    recipe.save(tmp_path / "out")
    assert (tmp_path / "out/text_encoder/card.json").is_file()
    saved = load_backbone(tmp_path / "out")
    torch.testing.assert_close(saved.text_encoder(ids).last_hidden_state, expected)
    with pytest.raises(UserError, match="runs/emoji/vae: no such folder"):
        backbone_recipe(source, "runs/emoji/vae", str(tmp_path / "clip"), unet)
    with pytest.raises(UserError, match="no SD1.5 model"):
        backbone_recipe(source, f"{folders[0]}/vae", f"{folders[0]}/vae", unet)


@pytest.mark.parametrize("prediction", [None, "v_prediction"])
def test_the_saved_scheduler_says_what_was_trained(folders, tmp_path, prediction):
    recipe = make_recipe("backbone", folders, prediction=prediction)
    recipe.save(tmp_path / "out")
    expected = prediction or "epsilon"
    assert recipe.loss.schedule.prediction == expected
    assert load_backbone(tmp_path / "out").scheduler.config["prediction_type"] == expected


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_decoder_that_hears_nothing_gets_the_text_through_its_skips(folders, share):
    """As a branch that reads English as the encoder does would have it: its skips beside ""."""
    recipe = make_recipe("backbone", folders, empty_decoder=share)
    denoiser = recipe.denoiser
    x_t, t = torch.randn(8, 4, 8, 8), torch.arange(8) * 100
    text, silence = (denoiser.captions.encode([word] * 8) for word in ("a red lantern", ""))
    spoken, told = skips(denoiser.unet, x_t, t, text), skips(denoiser.unet, x_t, t, silence)
    differences = [a - b for a, b in zip(spoken, told, strict=True)]
    through_skips = denoiser.unet(
        x_t, t, silence, down_block_additional_residuals=differences[:-1],
        mid_block_additional_residual=differences[-1],
    ).sample  # fmt: skip
    plain = denoiser.unet(x_t, t, text).sample
    assert (through_skips - plain).abs().max() > 1e-3
    batch = fixed_batch(recipe.source, 8, 0)
    assert denoiser.given(batch) == {}, "validation and pictures are told as ever"
    given = denoiser.train().given(batch)
    empties = given.get("empties", torch.zeros(8, dtype=torch.bool))
    assert empties.float().mean() == pytest.approx(share, abs=0.4)
    expected = torch.where(empties[:, None, None, None], through_skips, plain)
    torch.testing.assert_close(denoiser.predict(x_t, t, text, **given), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(denoiser.unet(x_t, t, text).sample, plain)


def skips(unet, x_t, t, text):
    """What the encoder hands over, the middle block's last."""
    first = unet.conv_in(x_t)
    embedded = unet.time_embedding(unet.time_proj(t))
    hidden, handed = first, [first]
    for block in unet.down_blocks:
        told = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        hidden, more = block(hidden_states=hidden, temb=embedded, **told)
        handed += more
    return [*handed, unet.mid_block(hidden, embedded, encoder_hidden_states=text)]
