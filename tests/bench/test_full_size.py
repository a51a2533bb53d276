"""A single file of SD1.5's full size.

How fast it loads and how much memory that takes, beside diffusers on the same file.
"""

from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open

from bdm.bench.compare import OURS, compare, median_and_spread
from bdm.bench.load import LoadBench
from bdm.config import BenchLoadConfig, read_config

CONFIG = Path(__file__).parents[2] / "configs/bench/load.yaml"
UNET_PARAMETERS = 859_520_964


@pytest.mark.slow
def test_full_size_file_loads_in_its_own_size_and_no_slower_than_diffusers():
    config = read_config(CONFIG, ["pairs=3"], BenchLoadConfig)
    bench = LoadBench(config)
    with safe_open(bench.file, "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    unet = [shape for name, shape in sizes.items() if name.startswith("model.diffusion_model.")]
    assert sum(prod(shape) for shape in unet) == UNET_PARAMETERS
    outcome = compare(bench, config)
    assert outcome.error == 0
    ratio, low, high = median_and_spread(outcome.ratios("diffusers"))
    size = bench.file.stat().st_size
    memory = {name: peak / size for name, peak in outcome.memory.items()}
    print(f"\ntime of diffusers / ours {ratio:.2f} ({low:.2f} to {high:.2f}); peak / file size {memory}")
    assert ratio >= 1.0
    assert memory[OURS] <= 1.3
