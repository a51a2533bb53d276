"""The figures of large corpora: within their bounds at a size that takes no time."""

from bdm.bench import data
from bdm.config import BenchDataConfig


def test_growth_and_reading(tmp_path):
    config = BenchDataConfig(
        kind="data", out=tmp_path, samples=(10_000, 2_000_000), per_shard=1000, batch=320,
        shards=8, rows=4, pairs=1,
    )  # fmt: skip
    rows = []
    for samples in config.samples:
        data.write_empty_index(tmp_path / str(samples), samples, config.per_shard)
        cost = data.cost_of_process(str(tmp_path / str(samples)), config.batch, 8, 8)
        rows.append({"samples": samples, "shards": samples // config.per_shard, **cost})
    assert rows[-1]["start_s"] < 5
    assert rows[-1]["memory_mb"] < 50
    reading = data.measure_reading(config, tmp_path)
    assert reading["bytes_over_corpus"] <= 1.15
    measured = {"growth": rows, "far": data._far(rows), "reading": reading}
    assert "1,200,000,000" in data.table(measured)
    data.draw_growth(measured, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
