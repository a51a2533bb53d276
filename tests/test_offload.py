"""Low-memory settings of diffusers draw the same picture.

Offloading to the CPU goes through the hooks that a GPU has, too.
"""

import pytest
import torch
from accelerate import cpu_offload
from tiny import make_branch, make_native


def draw(pipe, **changes):
    settings = dict(
        prompt=["龙", "红灯笼"], prompt_en=["", "ink"], num_inference_steps=3, guidance_scale=5.0, seed=1
    )
    return pipe(**settings | changes, output_type="pt").images


def offload_sequentially(pipe):
    """What ``enable_sequential_cpu_offload`` does, which would say "cpu:0" and so make accelerate copy every
    weight.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


SETTINGS = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": offload_sequentially,
    "sliced decoding": lambda pipe: pipe.vae.enable_slicing(),
    "sliced attention": lambda pipe: pipe.enable_attention_slicing(),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_picture(pipe, setting):
    plain = draw(pipe)
    SETTINGS[setting](pipe)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("setting", ["model offload", "sequential offload"])
def test_same_picture_of_several_branches(pipe, setting, shared):
    """Those beside the pipeline's own are none of its parts, and keep their weights."""
    other = pipe.branch if shared else make_branch(pipe.unet)
    pipe.add_branch("other", other, pipe.native_text_encoder if shared else make_native())
    plain = draw(pipe, beside={"other": "龙"})
    SETTINGS[setting](pipe)
    for _ in range(2):
        torch.testing.assert_close(draw(pipe, beside={"other": "龙"}), plain, atol=1e-4, rtol=1e-4)
    assert shared or not any(weight.is_meta for weight in other.parameters())


def test_order_of_model_offload(pipe):
    """Parts come in the order in which their predecessors go.

    The branch comes with the UNet and stays to the end.
    """
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(part): name for name, part in pipe.components.items()}
    arrivals, before = [], {}
    for user_hook in pipe._all_hooks:
        name, hook = names[id(user_hook.model)], user_hook.hook
        before[name] = names[id(hook.prev_module_hook.model)] if hook.prev_module_hook else None
        hook.pre_forward = lambda m, *a, n=name, f=hook.pre_forward, **k: arrivals.append(n) or f(m, *a, **k)
    draw(pipe, num_inference_steps=1)
    assert [n for i, n in enumerate(arrivals) if n not in arrivals[:i]] == [
        "native_text_encoder", "text_encoder", "branch", "unet", "vae"
    ]  # fmt: skip
    assert before == {
        "native_text_encoder": None,
        "text_encoder": "native_text_encoder",
        "unet": "text_encoder",
        "vae": "unet",
        "branch": None,
    }


def test_offloaded_parts_leave_the_device(pipe):
    """Under sequential offload no weight stays.

    Under model offload every part comes when it is first used.
    """
    offload_sequentially(pipe)
    draw(pipe)
    for name in ("unet", "branch", "vae", "text_encoder", "native_text_encoder"):
        part = getattr(pipe, name)
        assert all(p.is_meta for p in part.parameters()), name


def test_tiled_decoding_is_close(pipe):
    """Tiles are blended, so that the picture is only nearly the same; each is decoded alone."""
    settings = dict(height=128, width=128)
    plain = draw(pipe, **settings)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 64
    sizes = []
    hook = pipe.vae.decoder.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[-1]))
    tiled = draw(pipe, **settings)
    hook.remove()
    assert tiled.shape == plain.shape
    assert max(sizes) <= 8
    assert len(sizes) > 1
