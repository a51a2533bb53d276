import json
import logging

import pytest
import torch
from agreement import outputs_agree
from safetensors.torch import save_file
from tiny import NATIVE_DIM, TEXT_DIM, make_native_model
from transformers import (
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextModel,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from bdm.errors import UserError
from bdm.text.english import encode_english
from bdm.text.native import NativeTextEncoder, NativeTextSettings
from bdm.text.prompt import parse_emphasis
from bdm.text.vocabulary import chinese_clip_tokenizer, clip_tokenizer

LONG = "红灯笼和月饼还有饺子，" * 12  # 132 tokens: three chunks of 50


def by_hand(model, texts_ids, mask=False):
    """The official inference's chunks, written out.

    [CLS] + 50 tokens, last position [PAD], first [PAD] becomes [SEP].
    """
    chunks = []
    for start in range(0, max(len(texts_ids), 1), 50):
        ids = [101, *texts_ids[start : start + 50]]
        ids += [0] * (52 - len(ids))
        ids[51] = 0
        ids[ids.index(0)] = 102
        chunks.append(ids)
    attend = torch.ones(1, 52, dtype=torch.long)
    outputs = [model(torch.tensor([ids]), attention_mask=attend).last_hidden_state[0] for ids in chunks]
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([outputs[0][:-1], *(o[1:-1] for o in outputs[1:-1]), outputs[-1][1:]])


@torch.no_grad()
def test_native_features_equal_the_official_chunks_written_out(native):
    tokenizer = chinese_clip_tokenizer()
    for text, length in (("红灯笼", 52), ("月饼" * 30, 102), (LONG, 152)):
        features = native.encode([text])
        assert features.shape == (1, length, NATIVE_DIM)
        expected = by_hand(native.model, tokenizer(text, add_special_tokens=False).input_ids)
        torch.testing.assert_close(features[0], expected, atol=1e-6, rtol=0)
    together = native.encode(["红灯笼", LONG])
    assert together.shape == (2, 152, NATIVE_DIM)
    torch.testing.assert_close(together[1], native.encode([LONG])[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(together[:1, :51], native.encode(["红灯笼"])[:, :51], atol=1e-6, rtol=0)


def test_vocabularies_are_the_packages_own():
    from cn_clip.clip import tokenize as cn_tokenize
    from open_clip import get_tokenizer

    texts = ["红灯笼，Blue背景 T恤", "你好（世界）！", ""]
    ours = chinese_clip_tokenizer()(texts, padding="max_length", max_length=52).input_ids
    assert ours == cn_tokenize(texts, context_length=52).tolist()
    text = "A red paper lantern, blue background (1.5) naïve"
    assert clip_tokenizer()(text).input_ids == [i for i in get_tokenizer("ViT-B-32")([text])[0].tolist() if i]


@torch.no_grad()
def test_no_mask_padding_is_attended_and_the_mask_is_a_recorded_setting(native, tmp_path):
    masked = NativeTextEncoder(native.model, native.tokenizer, NativeTextSettings(mask=True))
    valid = slice(0, 5)
    assert (masked.encode(["红灯笼"])[:, valid] - native.encode(["红灯笼"])[:, valid]).abs().max() > 1e-3
    masked.save_pretrained(tmp_path)
    loaded = NativeTextEncoder.from_pretrained(tmp_path)
    assert loaded.settings == NativeTextSettings(mask=True)
    outputs_agree(loaded.encode(["红灯笼"]), masked.encode(["红灯笼"]))


@torch.no_grad()
def test_padding_row_survives_loading(tmp_path):
    model = make_native_model()
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight[0])
    model.save_pretrained(tmp_path)
    row = NativeTextEncoder.from_pretrained(tmp_path).model.embeddings.word_embeddings.weight[0]
    assert torch.equal(row, model.embeddings.word_embeddings.weight[0])
    assert row.abs().sum() > 0


@pytest.fixture
def full_clip(tmp_path):
    text = dict(
        vocab_size=21128,
        hidden_size=NATIVE_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()
    torch.nn.init.normal_(model.text_model.embeddings.word_embeddings.weight[0])
    model.save_pretrained(tmp_path)
    return model, tmp_path


@torch.no_grad()
def test_full_checkpoint_gives_its_text_model(full_clip):
    model, folder = full_clip
    encoder = NativeTextEncoder.from_pretrained(folder)
    expected = by_hand(
        model.text_model, chinese_clip_tokenizer()("红灯笼", add_special_tokens=False).input_ids
    )
    torch.testing.assert_close(encoder.encode(["红灯笼"])[0], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_cn_clip_files_and_cn_clip_itself_agree(tmp_path):
    from cn_clip.clip.configuration_bert import BertConfig as CnConfig
    from cn_clip.clip.modeling_bert import BertModel as CnBert

    arguments = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
    cn = CnBert(CnConfig(vocab_size_or_config_json_file=21128, **arguments)).eval()
    state = {f"module.bert.{k}": v for k, v in cn.state_dict().items() if not k.startswith("pooler")}
    torch.save(
        {"epoch": 1, "state_dict": state | {"module.logit_scale": torch.ones(())}}, tmp_path / "clip_cn.pt"
    )
    encoder = NativeTextEncoder.from_pretrained(tmp_path / "clip_cn.pt")
    ids = torch.tensor(
        [chinese_clip_tokenizer()("红灯笼，蓝色背景", padding="max_length", max_length=52).input_ids]
    )
    expected = cn(ids, attention_mask=torch.ones_like(ids))[0]
    torch.testing.assert_close(encoder.encode(["红灯笼，蓝色背景"]), expected, atol=1e-5, rtol=0)


def sentencepiece_tokenizer(folder):
    """A T5 tokenizer over a small SentencePiece model trained here."""
    import sentencepiece
    from transformers import T5Tokenizer

    (folder / "text").write_text("\n".join(["赤い提灯 と 月餅", "白い 猫 が いる", "a red lantern"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=23,
        hard_vocab_limit=False,  # releases differ by one in what they count
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return T5Tokenizer.from_pretrained(folder)


@torch.no_grad()
def test_any_transformers_encoder_can_take_the_place(tmp_path):
    (tmp_path / "vocab").mkdir()
    t5_tokenizer = sentencepiece_tokenizer(tmp_path / "vocab")
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    cases = {
        "bert": (BertModel(BertConfig(vocab_size=21128, **size)), chinese_clip_tokenizer()),
        "t5": (
            T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
            t5_tokenizer,
        ),
        "xlmr": (
            XLMRobertaModel(XLMRobertaConfig(vocab_size=21128, max_position_embeddings=64, **size)),
            chinese_clip_tokenizer(),
        ),
    }
    for name, (model, tokenizer) in cases.items():
        encoder = NativeTextEncoder(model, tokenizer)
        features = encoder.encode(["赤い提灯", "と 月餅 " * 40])
        assert features.shape == (2, encoder.layout.joined_length(features.shape[1] // 50), 16)
        encoder.save_pretrained(tmp_path / name)
        loaded = NativeTextEncoder.from_pretrained(tmp_path / name)
        outputs_agree(loaded.encode(["赤い提灯", "と 月餅 " * 40]), features, name)


def test_brackets():
    assert parse_emphasis("红(灯笼)[月饼](龙:1.5)") == [
        ("红", 1.0), ("灯笼", 1.1), ("月饼", pytest.approx(1 / 1.1)), ("龙", 1.5)
    ]  # fmt: skip
    assert parse_emphasis("((a) b") == [("a", pytest.approx(1.21)), (" b", pytest.approx(1.1))]
    assert parse_emphasis(r"\(a\) （b）:1") == [("(a) （b）:1", 1.0)]
    assert parse_emphasis("") == [("", 1.0)]


@torch.no_grad()
def test_native_brackets_are_parsed_away_and_full_width_ones_kept(native):
    plain = native.encode(["红灯笼"])
    assert torch.equal(native.encode(["红(灯笼:1.5)"]), plain)
    assert not torch.equal(native.encode(["红（灯笼）"]), plain)


def test_truncation_says_where(native, caplog):
    with caplog.at_level(logging.WARNING, "bdm"):
        features = native.encode(["月" * 260])
    assert features.shape[1] == 252
    assert "prompt cut to 250 of its 260 tokens, after" in caplog.text


@torch.no_grad()
def test_english_features(text_encoder):
    tokenizer = clip_tokenizer()
    plain = encode_english(["a red lantern"], text_encoder, tokenizer)
    ids = tokenizer(["a red lantern"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(plain, text_encoder(ids).last_hidden_state, atol=1e-6, rtol=0)
    assert encode_english(["lantern " * 100], text_encoder, tokenizer).shape == (1, 152, TEXT_DIM)
    # A random encoder's last norm leaves a mean of 0, which no factor restores.
    getattr(text_encoder, "text_model", text_encoder).final_layer_norm.bias.fill_(0.5)
    plain = encode_english(["a red lantern"], text_encoder, tokenizer)
    raised = encode_english(["a (red:1.4) lantern"], text_encoder, tokenizer)
    weights = torch.ones(77)
    weights[2] = 1.4
    expected = plain * weights[:, None]
    expected = expected * plain.mean() / expected.mean()
    torch.testing.assert_close(raised, expected, atol=1e-5, rtol=1e-4)


def test_emphasis_lies_in_the_chunk_where_its_words_are(text_encoder):
    """Each chunk is encoded, weighed and rescaled here; joined, they are the long prompt's features."""
    tokenizer = clip_tokenizer()
    found = encode_english(["x " * 70 + "(green:0.5) " + "x " * 20 + "(red:1.4)"], text_encoder, tokenizer)
    x, green, red = tokenizer("x green red", add_special_tokens=False).input_ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = [begin, *[x] * 70, green, *[x] * 4, end]
    second = [begin, *[x] * 16, red, *[end] * 59]
    chunks = []
    for ids, place, weight in ((first, 71, 0.5), (second, 17, 1.4)):
        features = text_encoder(torch.tensor([ids])).last_hidden_state[0]
        weights = torch.ones(77)
        weights[place] = weight
        weighed = features * weights[:, None]
        chunks.append(weighed * features.mean() / weighed.mean())
    expected = torch.cat([chunks[0][:-1], chunks[1][1:]])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_bad_text_encoders_are_named(tmp_path, full_clip):
    with pytest.raises(UserError, match="no such folder"):
        NativeTextEncoder.from_pretrained(tmp_path / "none")
    _, folder = full_clip
    model = ChineseCLIPTextModel.from_pretrained(folder)
    state = {k: v.clone() for k, v in model.state_dict().items() if "layer.1" not in k}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no weight for 'encoder\.layer\.1"):
        NativeTextEncoder.from_pretrained(folder)
    with pytest.raises(UserError, match="chunk_length 600 needs 602 positions"):
        NativeTextEncoder(make_native_model(), chinese_clip_tokenizer(), NativeTextSettings(chunk_length=600))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", [None, "100KB"])
def test_encoder_by_diffusers_options(native, tmp_path, variant, size):
    native.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert (len(list(tmp_path.glob("*-of-*"))) > 1) == (size is not None)
    loaded = NativeTextEncoder.from_pretrained(tmp_path, variant=variant, device_map="cpu")
    assert torch.equal(loaded.encode(["红灯笼"]), native.encode(["红灯笼"]))
    for other in (dict(variant="ema"), dict(use_safetensors=False)):
        with pytest.raises(UserError, match="holds no weights"):
            NativeTextEncoder.from_pretrained(tmp_path, **other)
    with pytest.raises(UserError, match="takes no option 'dtyp'; did you mean dtype"):
        NativeTextEncoder.from_pretrained(tmp_path, dtyp=torch.float16)


@pytest.mark.parametrize("noted", ["float32", "float16"])
def test_encoder_keeps_what_the_file_holds(native, tmp_path, noted):
    """Whatever dtype the configuration names: values are not rounded on the way."""
    native.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": noted}))
    for asked, dtype in (("auto", torch.float32), (None, torch.float32), (torch.float16, torch.float16)):
        for name in ("dtype", "torch_dtype"):
            loaded = NativeTextEncoder.from_pretrained(tmp_path, **{name: asked})
            assert loaded.dtype == dtype
            pairs = zip(loaded.parameters(), native.parameters(), strict=True)
            assert all(torch.equal(a, b.to(dtype)) for a, b in pairs)
    native.half().save_pretrained(tmp_path)
    assert NativeTextEncoder.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    assert NativeTextEncoder.from_pretrained(tmp_path).dtype == torch.float32
