"""Previews: a matrix in the place of a VAE."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from bdm.models.backbone import encode_moments
from bdm.models.samplers import make_scheduler
from bdm.serving.preview import Colours, Expected

EMOJI = Path(__file__).parents[2] / "assets/emoji"


def test_a_preview_looks_like_the_picture():
    vae = AutoencoderKL.from_pretrained(EMOJI / "vae").eval()
    colours, painted = Colours.of(vae), Image.new("RGB", (64, 64), "navy")
    ImageDraw.Draw(painted).ellipse((12, 8, 52, 56), fill="orange")
    pixels = torch.from_numpy(np.asarray(painted).copy()).float().movedim(-1, 0)[None]
    with torch.no_grad():
        mean, _ = encode_moments(vae, pixels / 127.5 - 1).chunk(2, 1)
    shown = np.asarray(colours.show(mean * vae.config["scaling_factor"])).astype(float)
    assert shown.shape == (64, 64, 3)
    assert np.corrcoef(shown.ravel(), np.asarray(painted).astype(float).ravel())[0, 1] > 0.6


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ 2M Karras", "Heun"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_step_expects_without_noise(name, prediction):
    """A network that knows the picture is expected to draw it, from the first step on."""
    scheduler = make_scheduler(name, prediction)
    scheduler.set_timesteps(6)
    expected, picture = Expected(scheduler), torch.randn(1, 4, 4, 4)
    latents = torch.randn(1, 4, 4, 4) * scheduler.init_noise_sigma
    step = scheduler.timesteps[0]
    kept = float(scheduler.alphas_cumprod[round(float(step))])
    scaled = scheduler.scale_model_input(latents, step)
    noise = (scaled - kept**0.5 * picture) / (1 - kept) ** 0.5
    answer = noise if prediction == "epsilon" else kept**0.5 * noise - (1 - kept) ** 0.5 * picture
    scheduler.step(answer, step, latents)
    found = expected.newest(latents)()
    assert (found - picture).abs().max() < 0.5
    assert (found - picture).abs().mean() < 0.2 * picture.abs().mean()
