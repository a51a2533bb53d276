"""Prepared shards in partitions and mixes: every sample once a pass, read where it lies or from a copy."""

import io
import json
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save

from bdm.config import RunConfig
from bdm.config.data import MixConfig, PreparedConfig
from bdm.data.batch import stream
from bdm.data.mixing import MixedSource
from bdm.data.node import Node
from bdm.data.prepared import PreparedSource
from bdm.errors import UserError
from bdm.training.recipes.build import build_source


def write_shard(files, folder, name, rows, first, gap):
    """A shard whose samples tell their numbers; between their members may lie a gap."""
    content, places = io.BytesIO(), []
    with tarfile.open(fileobj=content, mode="w") as tar:
        for i in range(first, first + rows):
            tensors = save({"moments": torch.full((2, 1, 1), float(i))})
            facts = json.dumps({"captions": [f"{folder[:4]}{i}"], "weights": [1.0]}).encode()
            own = []
            for ending, member in (("safetensors", tensors), ("gap", b"x" * gap), ("json", facts)):
                if ending == "gap" and not gap:
                    continue
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
                if ending != "gap":
                    own += [content.tell() - -(-len(member) // 512) * 512, len(member)]
            places.append(own)
    files.pipe_file(f"/{folder}/{name}.tar", content.getvalue())
    table = {
        "size": len(content.getvalue()),
        "places": places,
        "scores": [None] * rows,
        "buckets": [0] * rows,
    }
    files.pipe_file(f"/{folder}/{name}.json", json.dumps(table).encode())


def write_folder(folder, counts=(5, 3, 4, 6, 2), model="a", gap=0):
    files = fsspec.filesystem("memory")
    first = 0
    for split, sizes in (("train", counts), ("validation", (2,))):
        for number, rows in enumerate(sizes):
            write_shard(files, folder, f"{split}-{number:05d}", rows, first, gap)
            first += rows
    models = {"vae": {"source": "v", "fingerprint": model}}
    manifest = {"format": 1, "models": models, "scorer": None, "buckets": [], "size": 8}
    files.pipe_file(f"/{folder}/prepared.json", json.dumps(manifest).encode())
    files.pipe_file(f"/{folder}/duplicates.json", json.dumps({"rows": {}}).encode())
    return f"memory://{folder}"


@pytest.fixture(params=[0, 10_000], ids=["neighbours", "apart"])
def path(request):
    # A place of its own for each content: what is known of a file is kept.
    return write_folder(f"prep-{request.param}", gap=request.param)


def seen(source, batches, size=4, process=0, processes=1, **options):
    """Captions and moments of a stream's batches."""
    return [
        (caption, float(moments.mean()))
        for batch in stream(source, 0, batches, size, 7, process=process, processes=processes, **options)
        for caption, moments in zip(batch.captions, batch.moments, strict=True)
    ]


def config(path, **changes):
    return PreparedConfig(kind="prepared", path=path, **changes)


def test_every_sample_comes_once_a_pass_for_any_number_of_processes(path, tmp_path):
    source = build_source(config(path, partitions=3, local=tmp_path / "local"))
    whole = seen(source, 10)
    for start in (0, 20):
        assert sorted(whole[start : start + 20]) == sorted((f"prep{i}", float(i)) for i in range(20))
    node = Node(0, 2, 4)
    parts = [seen(source, 10, process=p, processes=4, node=Node(p // 2 * 2, 2, 4)) for p in range(4)]
    assert [row for b in range(10) for part in parts for row in part[b : b + 1]] == whole
    assert node.owned(3), "both machines have partitions"
    assert list((tmp_path / "local").glob("*.kept")), "shards were kept"
    again = pickle.loads(pickle.dumps(source))
    assert seen(again, 2) == whole[:8]


def test_a_machine_keeps_the_shards_of_its_own_partitions_only(path, tmp_path):
    source = build_source(config(path, partitions=4, local=tmp_path / "local"))
    own = source.on_node(Node(0, 1, 2), seed=7)
    assert 0 < own._shards.owned.sum() < len(source.shard_sizes)
    assert source._shards.owned is None, "the source itself is what it was"


def test_without_partitions_the_order_is_what_it_was(path):
    plain = PreparedSource(path)
    assert not hasattr(plain, "order")
    assert sorted(seen(plain, 5)) == sorted((f"prep{i}", float(i)) for i in range(20))
    assert [plain[i].caption for i in range(3)] == ["prep0", "prep1", "prep2"]
    assert [plain.validation.caption(i) for i in range(2)] == ["prep20", "prep21"]
    with pytest.raises(ValueError, match="give partitions"):
        config(path, local="/x")


def test_prepared_corpora_are_mixed_by_weight(path):
    other = write_folder("other", (8,))
    strange = write_folder("strange", (8,), model="b")
    parts = [
        {"weight": 3, "data": config(path, partitions=2).model_dump()},
        {"weight": 1, "data": config(other).model_dump()},
    ]
    mix = MixConfig(kind="mix", parts=parts)
    assert (mix.prepared, mix.buckets, mix.flip) == (True, None, 0.0)
    mixed = build_source(mix)
    found = [caption[:4] for caption, _ in seen(mixed, 20)]
    assert (found.count("prep"), found.count("othe")) == (60, 20)
    assert mixed.fingerprints == PreparedSource(path).fingerprints
    with pytest.raises(UserError, match="prepared by different models"):
        _ = MixedSource([PreparedSource(path), PreparedSource(strange)], [1, 1]).fingerprints
    raw = {"weight": 1, "data": {"kind": "folder", "path": "x"}}
    with pytest.raises(ValueError, match="some of its parts are prepared and others not"):
        MixConfig(kind="mix", parts=[*parts, raw])
    with pytest.raises(ValueError, match="needs pictures, and prepared shards hold none"):
        RunConfig(
            out="x", data=mix.model_dump(), recipe={"kind": "autoencoder", "model": {}},
            optimizer={"steps": 200, "batch_size": 1, "learning_rate": 1.0},
        )  # fmt: skip


def test_one_request_brings_both_members_of_a_sample(monkeypatch):
    path = write_folder("one-", (3,))
    source = PreparedSource(path)
    asked = []
    plain = source.read_bytes
    source.read_bytes = lambda *place: (asked.append(place), plain(*place))[1]
    assert source[1].caption == "one-1"
    assert len(asked) == 1
    assert np.array_equal(source[1].moments.numpy(), np.full((2, 1, 1), 1.0, dtype=np.float32))
