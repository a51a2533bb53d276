"""A LoRA and an embedding, made here from random numbers, attached, weakened and taken off again."""

import torch
from safetensors.torch import save_file

import bdm

pipe = bdm.BridgePipeline.from_pretrained("assets/emoji")
generator = torch.Generator().manual_seed(0)
layer = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_v"  # kohya's name of it
down, up = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 4)))
save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, "ink.safetensors")
save_file({"emb_params": torch.randn(2, 128, generator=generator)}, "mood.safetensors")


def draw(english=""):
    settings = dict(guidance_scale=2.0, num_inference_steps=8, seed=3, output_type="pt")
    return pipe("红灯笼", prompt_en=english, **settings).images


before = draw()
pipe.plugins.attach("ink.safetensors", strength=0.8)
print(f"with ink at 0.8 pixels change by {(draw() - before).abs().mean():.3f}")
pipe.plugins.set_strength("ink", 0.1)
print(f"with ink at 0.1 by {(draw() - before).abs().mean():.3f}")
pipe.plugins.attach("mood.safetensors")
print(f"with mood too by {(draw('mood') - before).abs().mean():.3f}", pipe.plugins, sep="\n")
pipe.plugins.clear()
assert torch.equal(draw(), before)
