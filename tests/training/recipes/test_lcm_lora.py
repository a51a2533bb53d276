"""Distillation follows the schedulers of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from tiny_recipes import make_recipe

from bdm.data.batch import fixed_batch
from bdm.models.noise_schedule import SD15_SCHEDULE, NoiseSchedule
from bdm.training.recipes.latents import draw_latents


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_teacher_and_end_are_those_of_diffusers(folders, prediction):
    """The teacher's step is DDIM's on the guided prediction.

    The end is what LCM's sampler makes of a prediction.
    """
    recipe = make_recipe("lcm_lora", folders)
    recipe.loss.schedule = NoiseSchedule(prediction)
    encode, unet = recipe.denoiser.captions.encode, recipe.denoiser.unet
    settings = {**SD15_SCHEDULE, "prediction_type": prediction}
    x, text, empty = torch.randn(3, 4, 8, 8), encode(["a cat"] * 3), encode([""] * 3)
    t, scale = torch.tensor([19, 499, 999]), torch.tensor([1.0, 2.0, 3.0])
    ddim, lcm = DDIMScheduler(**settings), LCMScheduler(**settings)
    ddim.set_timesteps(50)
    lcm.set_timesteps(timesteps=[999, 499, 19])
    ours = recipe.loss.teach(x, t, (t - 20).clamp(min=0), text, empty, scale)
    ends = recipe.loss.end(lambda x_t, t: recipe.denoiser.predict(x_t, t, text), x, t)
    for i, step in enumerate(t.tolist()):
        row = slice(i, i + 1)
        # A fresh LoRA changes nothing.
        bare, told = (unet(x[row], step, words[row]).sample for words in (empty, text))
        guided = bare + scale[i] * (told - bare)
        expected = ddim.step(guided, step, x[row]).prev_sample
        torch.testing.assert_close(ours[row], expected, atol=1e-4, rtol=1e-4)
        lcm._step_index = lcm.index_for_timestep(step)
        expected = lcm.step(told, step, x[row]).denoised
        torch.testing.assert_close(ends[row], expected, atol=1e-4, rtol=1e-4)


def test_the_loss_with_a_weight_is_weights_times_errors(folders):
    recipe = make_recipe("lcm_lora", folders, loss_weight="velocity")
    loss = recipe(fixed_batch(recipe.source, 4, 0))["loss"]
    batch = fixed_batch(recipe.source, 4, 0)
    t = recipe.loss.draw_timesteps(batch)
    told = recipe._tell(batch, recipe._drop(batch))
    errors = recipe.loss.error(told, draw_latents(recipe.vae, batch), t, batch)
    alpha_bar = DDIMScheduler(**SD15_SCHEDULE).alphas_cumprod[t]
    weights = 1 + (1 - alpha_bar) / alpha_bar
    torch.testing.assert_close(loss, (weights * errors).mean(), rtol=3e-5, atol=1e-5)
    assert (loss - errors.mean()).abs() > 0.1 * loss


def test_the_teacher_does_not_hear_what_the_student_learned(folders):
    recipe = make_recipe("lcm_lora", folders)
    denoiser = recipe.denoiser
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), denoiser.captions.encode(["a cat"] * 2)
    with torch.no_grad():
        before = denoiser.predict(x, t, text)
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert (denoiser.predict(x, t, text) - before).abs().max() > 0.01
        torch.testing.assert_close(recipe.loss.teacher(x, t, text), before, rtol=3e-5, atol=1e-5)
