"""A few steps of training a branch, and a picture with what they gave."""

import bdm
from bdm.config import RunConfig, read_config
from bdm.training.loop import train
from bdm.training.recipes.build import build_recipe

tiny = [
    "optimizer.steps=4",
    "optimizer.batch_size=4",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=1e-4",
]
quick = ["data.limit=4", "recipe.grid_prompts=[红灯笼]", "threads=1", "log_every=1", "trackers=[]"]
run = read_config("configs/quickstart.yaml", ["out=runs/example", *tiny, *quick], RunConfig)
folder = train(
    run, build_recipe(run)
)  # called again, it goes on where it stopped; here nothing is left to do

pipe = bdm.BridgePipeline.from_pretrained("assets/emoji", branch=folder)
picture = pipe("红灯笼", guidance_scale=2.0, num_inference_steps=8, seed=0).images[0]
picture.resize((256, 256), resample=0).save("after_four_steps.png")
print((run.out / "metrics.jsonl").read_text(), folder, "after_four_steps.png", sep="\n")
