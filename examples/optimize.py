"""optimize() prepares the networks once for all calls to come; the pictures stay the same."""

import time

import bdm

pipe = bdm.BridgePipeline.from_pretrained("assets/emoji")
pipe.set_progress_bar_config(disable=True)


def draw():
    start = time.perf_counter()
    pictures = pipe(
        ["红灯笼", "月饼"], guidance_scale=2.0, num_inference_steps=12, seed=0, output_type="pt"
    ).images
    return pictures, time.perf_counter() - start


draw()  # warms up
plain, plain_seconds = draw()
done = pipe.optimize(count=2)
ready, ready_seconds = draw()
print(done, f"{plain_seconds:.2f} s a call before, {ready_seconds:.2f} s after", sep="\n")
print(f"largest difference of a pixel: {(ready - plain).abs().max():.1e}")
assert (ready - plain).abs().max() < 1e-2
done.undo()
