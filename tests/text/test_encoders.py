"""Text encoders and tokenizers of folders: no code of theirs runs, none of their weights is left over."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from agreement import outputs_agree
from safetensors.torch import load_file, save_file
from tiny import make_native, make_native_model
from transformers import BertConfig, BertModel

from bdm.errors import UserError
from bdm.text.encoders import load_cn_clip, load_tokenizer, read_encoder_config
from bdm.text.native import NativeTextEncoder, NativeTextSettings
from bdm.text.vocabulary import chinese_clip_tokenizer

HARM = """
open({path!r}, "w").close()
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig):
    model_type = "own"
class Model(BertModel): pass
class Tokenizer(BertTokenizer): pass
"""


@pytest.fixture
def folder(tmp_path):
    """A text encoder's folder whose own code would leave a file behind."""
    NativeTextEncoder(BertModel(BertConfig(vocab_size=21128, hidden_size=16, intermediate_size=16,
                      num_hidden_layers=1, num_attention_heads=2)), chinese_clip_tokenizer()
                      ).save_pretrained(tmp_path / "encoder")  # fmt: skip
    (tmp_path / "encoder/own.py").write_text(HARM.format(path=str(tmp_path / "harmed")))
    return tmp_path / "encoder"


def rewrite(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


OWN = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForTextEncoding": "own.Model",
       "AutoTokenizer": ["own.Tokenizer", None]}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "own", None, 5])
@pytest.mark.parametrize(
    "tokenizer", [{}, {"auto_map": OWN}, {"auto_map": OWN, "tokenizer_class": "Tokenizer"}]
)
def test_no_code_of_a_folder_runs(folder, monkeypatch, kind, tokenizer):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask for
    rewrite(folder / "config.json", auto_map=OWN, model_type=kind, architectures=["Model"])
    rewrite(folder / "tokenizer_config.json", **tokenizer)
    if kind == "bert":
        assert NativeTextEncoder.from_pretrained(folder).encode(["红灯笼"]).shape == (1, 52, 16)
    else:
        with pytest.raises(UserError, match=r"code of the folder's own is never run"):
            NativeTextEncoder.from_pretrained(folder)
    assert not (folder.parent / "harmed").exists()
    assert not [name for name in sys.modules if name.endswith("own") and "transformers_modules" in name]


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_no_kernel_that_a_folder_names_is_fetched(folder, key):
    expected = NativeTextEncoder.from_pretrained(folder).encode(["红灯笼"])
    rewrite(folder / "config.json", **{key: "someone/kernel"}, text_config={key: "someone/kernel"})
    assert "someone" not in str(read_encoder_config(folder))
    loaded = NativeTextEncoder.from_pretrained(folder)
    assert "someone" not in str(loaded.model.config)
    assert loaded.model.config._attn_implementation in ("sdpa", "eager")
    outputs_agree(loaded.encode(["红灯笼"]), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, and its weights are"),
        ({"num_hidden_layers": 0}, "encoder.layer.0.*weights and configuration do not belong together"),
        ({"hidden_size": 10**9}, "config.json|describes no text encoder|cannot be used"),
        ({"vocab_size": 10**15}, "config.json|describes no text encoder|cannot be used"),
        ({"max_position_embeddings": 10**15}, "config.json|describes no text encoder|cannot be used"),
        ({"hidden_act": "no such"}, "describes no text encoder|cannot be used"),
        ({"hidden_size": "x"}, "describes no text encoder|cannot be used"),
        ({"num_attention_heads": 0}, "describes no text encoder|cannot be used"),
    ],
)
def test_configurations_that_cannot_be(folder, settings, message):
    rewrite(folder / "config.json", **settings)
    with pytest.raises(UserError, match=message):
        NativeTextEncoder.from_pretrained(folder)


def test_layers_that_would_be_left_out_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    more = {key.replace("layer.0", "layer.1"): t.clone() for key, t in weights.items() if "layer.0" in key}
    save_file(weights | more, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder\.layer\.1\..*which the model of its config.json has not"):
        NativeTextEncoder.from_pretrained(folder)
    beside = {"cls.predictions.bias": torch.zeros(3), "visual.conv1.weight": torch.zeros(3)}
    save_file(weights | beside, folder / "model.safetensors")
    assert NativeTextEncoder.from_pretrained(folder).text_dim == 16


def test_values_that_are_none_or_leave_the_precision(folder):
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("LayerNorm.bias"))
    for value, dtype, message in (
        (float("nan"), torch.float32, "NaN"), (1e5, torch.float16, "holds 100000, and float16"),
    ):  # fmt: skip
        save_file(weights | {key: torch.full_like(weights[key], value)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            NativeTextEncoder.from_pretrained(folder, torch_dtype=dtype)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mask": 1}, "mask '1'; give true or false"),
        ({"lower_case": "no"}, "lower_case 'no'"),
        ({"chunk_length": True}, "chunk_length 'True'; give a whole number"),
        ({"chunk_length": 0}, "chunk_length '0'"),
        ({"chunk_length": 50.0}, "chunk_length '50.0'"),
        ({"max_chunks": 10**12}, "max_chunks"),
        ({"clip_skip": 2}, "says 'clip_skip'; allowed are mask, chunk_length"),
    ],
)
def test_settings_beside_a_text_encoder_are_checked(folder, said, message):
    (folder / "native_text_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=message):
        NativeTextEncoder.from_pretrained(folder)
    (folder / "native_text_config.json").write_text('{"mask": true}')
    assert NativeTextEncoder.from_pretrained(folder).settings == NativeTextSettings(mask=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', "\ud800", ""])
def test_damaged_tokenizers_end_in_one_line(folder, content):
    (folder / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="its tokenizer cannot be used"):
        load_tokenizer(folder)


def test_tokens_that_the_text_encoder_has_no_row_for(tmp_path):
    small = NativeTextEncoder(make_native_model(vocab_size=200), chinese_clip_tokenizer())
    with pytest.raises(UserError, match=r"the tokenizer gives token \d+ and the text encoder knows 200"):
        small.encode(["红灯笼"])


@pytest.mark.parametrize("ending", [".pt", ".PT", ".Pt", ".pth", ".bin", ".safetensors"])
def test_cn_clip_under_any_ending(tmp_path, ending):
    model = make_native_model(hidden_size=64, intermediate_size=32, num_attention_heads=1)
    tensors = {f"module.bert.{key}": t for key, t in model.state_dict().items()}
    torch.save({"state_dict": tensors, "epoch": 3, "best": np.float64(0.5)}, tmp_path / f"a{ending}")
    loaded = NativeTextEncoder.from_pretrained(tmp_path / f"a{ending}")
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert.embeddings.word_embeddings.weight": None}, "no 'bert.' weights"),
        ({"bert.embeddings.word_embeddings.weight": torch.zeros(5)}, "is damaged"),
        ({"bert.embeddings.position_embeddings.weight": None}, "is damaged"),
        ({"bert.encoder.layer.900000.x": torch.zeros(1)}, "block 900000"),
        ({"bert.encoder.layer.x.y": torch.zeros(1)}, "such weights"),
        ({"bert.encoder.layer.0.attention.self.query.weight": None}, "no weight for"),
    ],
)
def test_damaged_files_of_cn_clip(tmp_path, change, message):
    model = make_native_model(hidden_size=64, intermediate_size=32, num_attention_heads=1)
    tensors = {f"bert.{key}": t for key, t in model.state_dict().items()} | change
    torch.save({key: t for key, t in tensors.items() if t is not None}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        load_cn_clip(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["龙\ud83d", "\udcff", "a (\ude00:1.2)"])
def test_half_a_character_is_named(text):
    with pytest.raises(UserError, match=r"holds half a character \(U\+D[89A-F]") as raised:
        make_native().encode(["红灯笼", text])
    str(raised.value).encode("utf-8")


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_the_half_that_reads_of_a_model_of_texts_and_pictures(folder):
    """A CLIP saved whole gives the features of its text model's own folder; what reads no text is refused."""
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 21128, "max_position_embeddings": 64}
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(folder)
    encoder = NativeTextEncoder.from_pretrained(folder)
    assert encoder.text_dim == 16
    ids = torch.randint(100, 200, (2, 20))
    ours = encoder.model(input_ids=ids).last_hidden_state
    assert torch.equal(ours, whole.text_model(input_ids=ids).last_hidden_state)
    siglip = transformers.SiglipConfig(text_config=text, vision_config=vision)
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    for other in (transformers.SiglipModel(siglip), transformers.ResNetModel(resnet)):
        other.save_pretrained(folder)
        with pytest.raises(UserError, match=r"describes no text encoder|makes no features of texts"):
            NativeTextEncoder.from_pretrained(folder)
