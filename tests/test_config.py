from pathlib import Path

import pytest
import yaml

from bdm.config import BENCHES, EvaluateConfig, RunConfig, read_config
from bdm.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configurations():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_loads_and_says_how_to_run_it(path):
    if path.parent.name == "bench":
        kind = yaml.safe_load(path.read_text(encoding="utf-8"))["kind"]
        schema, command = BENCHES[kind], f"bdm bench {kind}"
    else:
        evaluates = path.stem in ("evaluate", "plugins")
        schema, command = (EvaluateConfig, "bdm evaluate") if evaluates else (RunConfig, "train.py")
    read_config(path, [], schema)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("# ")
    assert f"{command} {path.relative_to(ROOT)}" in header


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
        (["recipe={kind: judge}", "data={kind: folder, path: x}"], "the judge knows the emoji world only"),
    ],
)
def test_bad_keys_and_combinations_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read_config(ROOT / "configs/emoji/branch.yaml", overrides, RunConfig)


def test_overrides_and_missing_files(tmp_path):
    run = read_config(ROOT / "configs/emoji/branch.yaml", ["optimizer.steps=777", "data.groups=[native]"], RunConfig)
    assert run.optimizer.steps == 777
    assert run.data.groups == ("native",)
    with pytest.raises(UserError, match="No such file"):
        read_config(tmp_path / "none.yaml", [], RunConfig)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        read_config(tmp_path / "bad.yaml", [], RunConfig)
