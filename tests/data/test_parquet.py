"""Parquet files read like tar shards, a row group a shard."""

import io

import pytest
import torch
from PIL import Image

from bdm.data import parquet
from bdm.data.batch import stream
from bdm.data.buckets import bucket_sizes
from bdm.data.local import LocalFolder
from bdm.data.parquet import ParquetSource
from bdm.data.source import UnreadableExample
from bdm.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(row):
    file = io.BytesIO()
    Image.new("RGB", (24, 16 if row % 2 else 24), (row, 0, 0)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two files of three row groups of four samples, pictures as Hugging Face writes them."""
    for number in range(2):
        rows = range(12 * number, 12 * number + 12)
        pictures = [{"bytes": png(row) if row != 5 else None, "path": f"{row}.png"} for row in rows]
        table = pa.table({
            "image": pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"图{row}" for row in rows], "short": [str(row) if row % 3 else None for row in rows],
            "score": [row / 24 for row in rows],
        })  # fmt: skip
        pq.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=4)
    return tmp_path


def test_rows_are_what_was_written(folder):
    source = ParquetSource(
        str(folder / "*.parquet"), size=8, captions={"text": 3.0, "short": 1.0}, min_scores={"score": 0.1}
    )
    assert (source.shard_sizes, len(source.validation)) == ([4] * 5, 4)
    assert source[7].pixels[:, 0, 0].tolist() == [7, 0, 0]
    assert (source[7].captions, source[6].captions) == (("图7", "7"), ("图6",))
    assert source.caption(19) == "图19"
    assert source.validation[3].caption == "图23"
    assert source.key(13).endswith("train-1.parquet:0/1")
    with pytest.raises(UnreadableExample, match="score is 0.0, below 0.1"):
        source[0]
    with pytest.raises(UnreadableExample, match=r"0.parquet:1/1: its column image holds no picture's bytes"):
        source[5]


def test_order_does_not_depend_on_processes_or_workers(folder):
    source = ParquetSource(
        str(folder / "*.parquet"), size=16, buckets=bucket_sizes(16, 4), captions={"text": 1.0}
    )
    whole = [(b.indices, b.captions) for b in stream(source, 0, 6, 4, seed=2, unreadable_limit=1.0)]
    late = [(b.indices, b.captions) for b in stream(source, 3, 6, 4, seed=2, workers=1, unreadable_limit=1.0)]
    assert late == whole[3:]
    halves = [
        list(stream(source, 0, 6, 4, seed=2, process=r, processes=2, unreadable_limit=1.0)) for r in range(2)
    ]
    assert [(a.indices + b.indices, a.captions + b.captions) for a, b in zip(*halves, strict=True)] == whole
    shapes = {tuple(source[i].pixels.shape[1:]) for i in range(20) if i != 5}
    assert shapes == {(16, 16), (12, 20)}


def test_bad_files(folder):
    with pytest.raises(UserError, match="has no column 'caption'; it has image, text, short, score"):
        ParquetSource(str(folder / "*.parquet"), captions={"caption": 1.0})
    with pytest.raises(UserError, match="has no column 'jpg'"):
        ParquetSource(str(folder / "*.parquet"), picture="jpg")
    with pytest.raises(UserError, match="kept for validation"):
        ParquetSource(str(folder / "train-0.parquet"), validation_shards=3)
    (folder / "train-9.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a whole parquet file"):
        ParquetSource(str(folder / "train-9.parquet"), validation_shards=0)
    assert len(ParquetSource(str(folder / "*.parquet"), cache=folder / "fresh")) == 20


def test_row_groups_are_read_once_by_all_processes_of_a_machine(folder, monkeypatch):
    source = ParquetSource(str(folder / "*.parquet"), size=8)
    reads = 0
    for _ in range(4):  # as of processes of their own
        parquet._read_group.cache_clear()
        parquet._map_table.cache_clear()
        assert [source.caption(i) for i in range(20)] == [f"图{i}" for i in range(20)]
        reads += parquet._read_group.cache_info().misses
    assert reads == 5
    monkeypatch.setattr(LocalFolder, "get", lambda *_: None)  # a disk that takes nothing
    assert source.caption(3) == "图3"


def test_a_damaged_row_group_costs_its_samples_alone(folder):
    path = folder / "train-0.parquet"
    source = ParquetSource(str(folder / "*.parquet"), size=8, validation_shards=1)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1)
    for number in range(group.num_columns):
        start = group.column(number).dictionary_page_offset or group.column(number).data_page_offset
        content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    parquet._open.cache_clear()
    parquet._read_group.cache_clear()
    source = ParquetSource(str(folder / "*.parquet"), size=8, validation_shards=1)
    with pytest.raises(UnreadableExample, match="row group 1"):
        source[4]
    assert source.caption(0) == "图0"


def test_any_file_system_of_fsspec_and_plain_bytes(folder):
    import fsspec

    plain = pa.table({"picture": [png(row) for row in range(4)], "text": ["a", "b", "c", "d"]})
    pq.write_table(plain, folder / "plain.parquet", row_group_size=2)
    fsspec.filesystem("memory").pipe("/parquet/plain.parquet", (folder / "plain.parquet").read_bytes())
    source = ParquetSource("memory://parquet/*.parquet", picture="picture", size=8)
    local = ParquetSource(str(folder / "plain.parquet"), picture="picture", size=8)
    assert torch.equal(source[1].pixels, local[1].pixels)
    assert local.caption(1) == "b"


def test_a_dataset_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (20, 20), (row, 0, 0)) for row in range(6)]
    made = datasets.Dataset.from_dict({"image": pictures, "text": [str(row) for row in range(6)]})
    made = made.cast_column("image", datasets.Image())
    made.to_parquet(str(tmp_path / "made.parquet"), batch_size=3)
    groups = pq.ParquetFile(tmp_path / "made.parquet").num_row_groups
    source = ParquetSource(str(tmp_path / "made.parquet"), size=8, validation_shards=min(1, groups - 1) or 1)
    assert source[2].pixels[0, 0, 0] == 2
    assert source.caption(2) == "2"
