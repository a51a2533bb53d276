"""Prepared shards: the same bytes whoever writes them, and the same training as from pictures."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tiny import NATIVE_DIM, make_unet, make_vae
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from bdm.config import PrepareConfig
from bdm.data.batch import stream
from bdm.data.prepared import PreparedSource
from bdm.data.shards import ShardSource
from bdm.data.source import UnreadableExample
from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.models.noise_schedule import SD15_SCHEDULE
from bdm.prepare import writer
from bdm.prepare.hashing import find_duplicates, perceptual_hash
from bdm.prepare.report import describe_report
from bdm.prepare.run import Job, prepare
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import clip_tokenizer
from bdm.training.recipes.branch import branch_recipe

SHARDS, ROWS = 3, 6
#: More than one chunk of 50 tokens.
LONG = "一只熊猫在竹林里，" * 7


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Raw shards of emoji pictures with two captions each, and the folders of tiny models."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("world")
    emoji = EmojiSource(World(), limit=4, size=64)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(root / f"{shard:05d}.tar")) as tar:
            for row in range(ROWS):
                example = emoji[(shard * ROWS + row) * 5 % len(emoji)]
                facts = {"zh": example.caption, "long": LONG + example.caption}
                tar.write(
                    {
                        "__key__": f"{shard}-{row}",
                        "png": png(example.pixels),
                        "json": json.dumps(facts).encode(),
                    }
                )
    from tiny import TEXT_DIM, make_native_model
    from transformers import CLIPTextConfig, CLIPTextModel

    from bdm.text.vocabulary import chinese_clip_tokenizer

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    StableDiffusionPipeline(
        make_vae(),
        CLIPTextModel(config),
        clip_tokenizer(),
        make_unet(),
        DDIMScheduler(**SD15_SCHEDULE),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(root / "backbone")
    NativeTextEncoder(make_native_model(), chinese_clip_tokenizer()).save_pretrained(root / "native")
    text = dict(
        vocab_size=21128,
        hidden_size=NATIVE_DIM,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(root / "clip")
    return root


def configuration(world, out, **changes):
    data = dict(
        kind="shards",
        urls=str(world / "*.tar"),
        size=64,
        captions={"zh": 3.0, "long": 1.0},
        cache=world / "index",
    )
    data |= changes.pop("data", {})
    models = dict(
        vae=str(world / "backbone"), native_text_encoder=str(world / "native"), scorer=str(world / "clip")
    )
    return PrepareConfig(
        out=out, data=data, batch_size=4, samples_per_shard=ROWS, threads=1, **models | changes
    )


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    report = prepare(configuration(world, out))
    assert report["kept"] == SHARDS * ROWS
    return out


def contents(folder):
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.name not in ("report.json", "scores.png")
    }


def _prepare_in_process(config):
    AcceleratorState._reset_state(True)
    prepare(config)


def test_two_processes_write_the_same_bytes(world, prepared, tmp_path):
    from accelerate import debug_launcher

    debug_launcher(_prepare_in_process, (configuration(world, tmp_path),), num_processes=2)
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_of_ray_write_the_same_bytes(world, prepared, tmp_path):
    ray = pytest.importorskip("ray")
    from pathlib import Path

    root = str(Path(__file__).parents[2])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        report = prepare(configuration(world, tmp_path), "ray")
    finally:
        ray.shutdown()
    assert report["shards"] == SHARDS
    assert contents(tmp_path) == contents(prepared)


def losses(source, world, steps=2):
    recipe = branch_recipe(source, str(world / "backbone"), str(world / "native"), empty_caption=0.3, seed=0)
    # As the loop does.
    recipe.requires_grad_(False).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(recipe.denoiser.branch.requires_grad_(True).parameters(), lr=1e-2)
    found = []
    for batch in stream(source, 0, steps, 4, seed=1):
        loss = recipe(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), batch.captions))
    return found


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("features", "float16"), ("features", "float32"), ("ids", "float32"), ("none", "float32")],
)
def test_training_is_as_from_pictures(world, prepared, tmp_path, text, dtype):
    pictures = ShardSource(
        str(world / "*.tar"), size=64, captions={"zh": 3.0, "long": 1.0}, cache=world / "index"
    )
    if (text, dtype) != ("features", "float16"):
        prepare(configuration(world, tmp_path, text=text, dtype=dtype, scorer=None))
        prepared = tmp_path
    source = PreparedSource(str(prepared), duplicates=True)
    assert (len(source), len(source.validation)) == ((SHARDS - 1) * ROWS, ROWS)
    assert source.caption(3) == pictures.caption(3)
    expected, got = losses(pictures, world), losses(source, world)
    assert [captions for _, captions in got] == [captions for _, captions in expected]
    assert any(c.startswith(LONG) for _, captions in expected for c in captions)
    tolerance = 1e-2 if dtype == "float16" else 1e-6
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], rel=tolerance)


def test_moments_and_features_are_those_of_the_models(world, prepared):
    source = PreparedSource(str(prepared), duplicates=True)
    pictures = ShardSource(
        str(world / "*.tar"), size=64, captions={"zh": 3.0, "long": 1.0}, cache=world / "index"
    )
    encoders = Job(configuration(world, prepared)).encoders
    for index in (0, 7):
        raw, example = pictures[index], source[index]
        assert (example.captions, example.caption_weights) == (raw.captions, raw.caption_weights)
        with torch.no_grad():
            posterior = encoders.vae.encode(raw.pixels[None].float() / 127.5 - 1).latent_dist
            moments = torch.cat([posterior.mean, posterior.logvar], 1)[0]
            long = encoders.native.encode([raw.captions[1]])[0]
        torch.testing.assert_close(example.moments, moments.half(), rtol=2e-3, atol=1e-3)
        assert [len(f) for f in example.prepared_text] == [52, 102]
        torch.testing.assert_close(example.prepared_text[1], long.half(), rtol=2e-3, atol=2e-3)


def test_other_models_are_refused(world, prepared, tmp_path):
    source = PreparedSource(str(prepared), duplicates=True)
    shutil.copytree(world / "backbone", tmp_path / "backbone")
    encoders = Job(configuration(world, prepared)).encoders
    encoders.vae.decoder.conv_in.weight.data.mul_(2)
    encoders.vae.save_pretrained(tmp_path / "backbone/vae")
    branch_recipe(source, str(tmp_path / "backbone"), str(world / "native"))  # only the encoder prepares
    encoders.vae.encoder.conv_in.weight.data.mul_(2)
    encoders.vae.save_pretrained(tmp_path / "backbone/vae")
    with pytest.raises(
        UserError,
        match=rf"its vae was {world}/backbone \(\w+\), in use is {tmp_path}/backbone \(\w+\); use those",
    ):
        branch_recipe(source, str(tmp_path / "backbone"), str(world / "native"))
    settings = dataclasses.replace(encoders.native.settings, mask=True)
    NativeTextEncoder(encoders.native.model, encoders.native.tokenizer, settings).save_pretrained(
        tmp_path / "native"
    )
    with pytest.raises(UserError, match=r"its text encoder was .*native \(\w+\), in use is .*native"):
        branch_recipe(source, str(world / "backbone"), str(tmp_path / "native"))


def test_a_missing_scorer_is_named_and_can_be_done_without(world, tmp_path):
    with pytest.raises(UserError, match=r"^scorer: .*; or set scorer: null to prepare without scores$"):
        prepare(configuration(world, tmp_path / "unscored", scorer=str(tmp_path / "nothing")))


def test_a_restart_prepares_what_is_missing_and_nothing_else(world, prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / "train-00000.tar").unlink()
    damaged = out / "validation-00000.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    stamp = (out / "train-00001.tar").stat().st_mtime_ns
    report = prepare(configuration(world, out))
    assert report["prepared_now"] == 2 * ROWS
    assert (out / "train-00001.tar").stat().st_mtime_ns == stamp
    assert contents(out) == contents(prepared)
    with pytest.raises(UserError, match=r"another configuration \(dtype: float16 -> float32\)"):
        prepare(configuration(world, out, dtype="float32"))
    (out / "duplicates.json").unlink()
    with pytest.raises(UserError, match="is no finished folder of prepared shards"):
        PreparedSource(str(out))


def test_a_full_disk_leaves_whole_shards_alone(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "os", SimpleNamespace(fsync=full))
    with pytest.raises(UserError, match=r"train-00000.tar cannot be written \(No space left on device\)"):
        prepare(configuration(world, tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"prepared.json"}


def test_not_a_number_and_cut_shards_are_found(prepared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    tar = out / "train-00000.tar"
    offset, size = json.loads(tar.with_suffix(".json").read_text())["places"][2][:2]
    content = bytearray(tar.read_bytes())
    content[offset + size - 2 : offset + size] = np.array([np.nan], dtype=np.float16).tobytes()
    tar.write_bytes(content)
    source = PreparedSource(str(out), duplicates=True)
    assert source[1].moments is not None
    with pytest.raises(UnreadableExample, match=r"train-00000.tar:2: .* is not finite"):
        source[2]
    tar.write_bytes(content[:-600])
    with pytest.raises(UserError, match=r"train-00000.tar has \d+ bytes, its table says"):
        PreparedSource(str(out))


def test_filters_are_counted_and_named(world, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(world / "00001.tar", raw / "00001.tar")
    samples = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(4)]
    with webdataset.TarWriter(str(raw / "00000.tar")) as tar:
        contents_ = [
            png(samples[0]),
            png(samples[0]),
            b"damaged",
            png(samples[1][:, :8]),
            png(samples[2]),
            png(samples[3]),
        ]
        for row, content in enumerate(contents_):
            tar.write(
                {
                    "__key__": f"{row}",
                    "png": content,
                    "json": b"{}" if row == 4 else json.dumps({"zh": "红灯笼"}).encode(),
                }
            )
    data = dict(urls=str(raw / "*.tar"), captions={"zh": 1.0}, min_side=16)
    report = prepare(configuration(world, tmp_path / "out", data=data, unreadable_limit=1.0))
    assert report["left_out"] == {"caption": 1, "size": 1, "unreadable": 1}
    assert (report["kept"], report["samples"]) == (3 + ROWS, 2 * ROWS)
    assert "9 of 12 samples kept" in describe_report(report, tmp_path)
    named = [json.loads(line) for line in (tmp_path / "out/unusable.jsonl").read_text().splitlines()]
    assert [row["key"].rpartition(":")[2] for row in named] == ["2", "3", "4"]
    assert (tmp_path / "out/scores.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/duplicates.json").read_text())["rows"]["train-00000.tar"] == [1]
    assert len(PreparedSource(str(tmp_path / "out"))) == 2
    # A threshold leaves out the same samples when preparing as when training.
    scores = json.loads((tmp_path / "out/train-00000.json").read_text())["scores"]
    threshold = (scores[0] + scores[2]) / 2
    later = PreparedSource(str(tmp_path / "out"), threshold, duplicates=True)
    filtered = prepare(
        configuration(world, tmp_path / "at_once", data=data, unreadable_limit=1.0, min_score=threshold)
    )
    at_once = PreparedSource(str(tmp_path / "at_once"), duplicates=True)
    assert len(at_once) == len(later) == sum(score >= threshold for score in scores)
    assert filtered["left_out"]["min_score"] >= 1
    with pytest.raises(UserError, match=r"2 of 6 samples cannot be used.*unreadable_limit"):
        prepare(configuration(world, tmp_path / "strict", data=data, unreadable_limit=0.004))


def test_buckets_are_prepared_and_batches_are_of_one(world, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(raw / f"{shard:05d}.tar")) as tar:
            for row in range(8):
                shape = (3, 40, 90) if row % 2 else (3, 90, 60)
                pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
                tar.write(
                    {"__key__": f"{row}", "png": png(pixels), "json": json.dumps({"zh": f"图{row}"}).encode()}
                )
    data = dict(urls=str(raw / "*.tar"), captions={"zh": 1.0}, buckets=dict(step=16, max_aspect=2.0))
    prepare(configuration(world, tmp_path / "out", data=data, scorer=None))
    source = PreparedSource(str(tmp_path / "out"), duplicates=True)
    shapes = {tuple(b.moments.shape) for b in stream(source, 0, 6, 2, seed=0)}
    # The buckets nearest 60x90 and 90x40 are 48x80 and 80x48; the VAE makes an eighth of each side.
    assert shapes == {(2, 8, 10, 6), (2, 8, 6, 10)}
    assert all(np.isfinite(loss) for loss, _ in losses(source, world))


def test_hashes_see_the_picture_and_not_its_size():
    emoji = EmojiSource(World(), limit=8, size=128)
    pictures = [Image.fromarray(emoji[i].pixels.permute(1, 2, 0).numpy()) for i in range(0, len(emoji), 32)]

    def hashed(picture):
        return perceptual_hash(torch.from_numpy(np.array(picture)).permute(2, 0, 1))

    hashes = [hashed(p) for p in pictures]
    assert len(set(hashes)) == len(hashes)
    distance = [(hashed(p.resize((64, 64))) ^ h).bit_count() for p, h in zip(pictures, hashes, strict=True)]
    between = [(a ^ b).bit_count() for a in hashes for b in hashes if a != b]
    assert max(distance) <= 2 < min(between)
    assert find_duplicates([[5, 6, 5], [7], [6, 8]]) == [[2], [], [0]]
