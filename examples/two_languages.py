"""A lion in two languages, each as its own world draws it; and what only the Chinese one knows."""

import bdm

pipe = bdm.BridgePipeline.from_pretrained("assets/emoji")
settings = dict(guidance_scale=2.0, num_inference_steps=12, seed=3)

pictures = {
    "chinese": pipe("狮子，蓝色背景", **settings),  # read by the branch; the backbone gets ""
    "english": pipe("", prompt_en="lion, blue background", branch_scale=0.0, **settings),  # no branch
    "native": pipe("红灯笼，蓝色背景", **settings),  # the backbone never saw a red lantern
}
for name, drawn in pictures.items():
    drawn.images[0].resize((256, 256), resample=0).save(f"{name}.png")
    print(f"{name}.png")
