import os
import subprocess
from pathlib import Path

import pytest
import yaml

from bdm.config import (
    BENCHES,
    BenchGpuConfig,
    EvaluateConfig,
    FilterConfig,
    PrepareConfig,
    PromptsConfig,
    RoutesConfig,
    RunConfig,
    ShipConfig,
    VocabularyConfig,
    read_config,
)
from bdm.errors import UserError

ROOT = Path(__file__).parents[2]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(LAUNCHES))


def test_there_are_configurations():
    assert len(CONFIGS) >= 8
    assert len(LAUNCHES) == 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_loads_and_says_how_to_run_it(path):
    if path.parent.name == "bench":
        kind = yaml.safe_load(path.read_text(encoding="utf-8"))["kind"]
        schema, command = {**BENCHES, "gpu": BenchGpuConfig}[kind], f"bdm bench {kind}"
    elif path.stem.startswith("compare"):
        schema, command = RoutesConfig, "bdm evaluate"
    elif path.parent.name == "evaluate":
        schema, command = PromptsConfig, "bdm evaluate"
    elif path.stem in ("evaluate", "plugins", "modes", "languages", "ablation", "world", "demo"):
        schema, command = EvaluateConfig, "bdm evaluate"
    elif path.stem == "filter":
        schema, command = FilterConfig, "bdm evaluate"
    elif path.stem == "shipped":
        schema, command = ShipConfig, "bdm ship"
    elif path.stem.startswith("prepare"):
        schema, command = PrepareConfig, "bdm prepare"
    elif path.stem.startswith("vocabulary"):
        schema, command = VocabularyConfig, "bdm vocabulary"
    else:
        schema, command = RunConfig, "train.py"
    read_config(path, [], schema)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("# ")
    assert f"{command} {path.relative_to(ROOT)}" in header


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_every_launch_configuration_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    many = path.stem != "one_gpu"
    assert (config.num_processes > 1) == many
    assert str(config.distributed_type).endswith(
        {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "one_gpu": "NO"}.get(path.stem, "GPU")
    )
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"accelerate launch --config_file {path.relative_to(ROOT)}" in header


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (138, True), (143, False)])
def test_slurm_script_requeues_after_pre_emption_only(tmp_path, status, requeued):
    """With srun and scontrol played by small scripts."""
    fakes = {"srun": f'echo "$@" >> ran; exit {status}', "scontrol": 'echo "$@" >> asked; echo node-1'}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[1-4]",
    }
    command = [
        "bash",
        str(ROOT / "configs/slurm/train.sbatch"),
        "configs/quickstart.yaml",
        "out=runs/with space",
    ]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == status
    assert "train.py configs/quickstart.yaml out=runs/with space" in (tmp_path / "ran").read_text()
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == requeued


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=1"], "optimizer.lr: unknown key"),
        (["recipe.kind=banana"], "recipe"),
        (["optimizer.steps=0"], "optimizer.steps"),
        (["optimizer.warmup_steps=99999"], "warmup_steps 99999 must be below steps"),
        (["optimizer.batch_size=7", "optimizer.accumulation=2"], "not divisible by accumulation"),
        (["nonsense"], "not of the form key=value"),
        (["out.deeper=1"], "'out' is a value"),
        (["data.urls=*.tar"], r"override 'data.urls=\*.tar': .* is not a whole YAML value"),
        (["data.groups=[native"], "close its brackets"),
        (["threads=-1"], "threads"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1"),
        (["recipe.cache=true", "data={kind: prepared, path: x}"], "prepared shards are a cache already"),
        (
            ["recipe={kind: autoencoder, model: {}}", "data={kind: prepared, path: x}"],
            "prepared shards hold none",
        ),
        (["recipe.cache=true", "data={kind: folder, path: x, flip: 0.5}"], "leave out buckets and flip"),
        (["recipe={kind: judge}", "data={kind: folder, path: x}"], "the judge knows the emoji world only"),
        (
            ["optimizer.name=prodigy", 'optimizer.rate_factors={"branch.*": 2}'],
            "one step size for all parameters",
        ),
        (["recipe.cache=true", "data.flip=0.5"], "leave out buckets and flip"),
    ],
)
def test_bad_keys_and_combinations_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read_config(ROOT / "configs/emoji/branch.yaml", overrides, RunConfig)


def test_colours_of_plugins_are_the_worlds():
    with pytest.raises(UserError, match="plugins.embedding_colour.*'purple' or 'pink'"):
        read_config(ROOT / "configs/emoji/plugins.yaml", ["plugins.embedding_colour=mauve"], EvaluateConfig)


def test_english_guidance_needs_guidance():
    with pytest.raises(UserError, match="raise it above 1, or leave it out"):
        read_config(
            ROOT / "configs/emoji/evaluate.yaml", ["guidance=1", "english_guidance=2"], EvaluateConfig
        )


def test_the_branch_from_prepared_shards_is_trained_as_the_one_from_pixels():
    pixels, prepared = (
        read_config(ROOT / f"configs/emoji/{name}.yaml", [], RunConfig)
        for name in ("branch", "branch_prepared")
    )
    assert prepared.optimizer == pixels.optimizer
    assert prepared.recipe == pixels.recipe.model_copy(update={"cache": False}), (
        "prepared shards are the cache"
    )


def test_overrides_and_missing_files(tmp_path):
    run = read_config(
        ROOT / "configs/emoji/branch.yaml", ["optimizer.steps=777", "data.groups=[native]"], RunConfig
    )
    assert run.optimizer.steps == 777
    assert run.data.groups == ("native",)
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "none.yaml", [], RunConfig)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config(tmp_path / "bad.yaml", [], RunConfig)


@pytest.mark.parametrize(("said", "meant"), [("no", "no"), ("'no'", "no"), ("bf16", "bf16")])
def test_no_precision_need_not_be_quoted(said, meant):
    run = read_config(ROOT / "configs/quickstart.yaml", [f"optimizer.mixed_precision={said}"], RunConfig)
    assert run.optimizer.mixed_precision == meant
    with pytest.raises(UserError, match="mixed_precision"):
        read_config(ROOT / "configs/quickstart.yaml", ["optimizer.mixed_precision=yes"], RunConfig)
