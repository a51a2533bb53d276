"""SentencePiece vocabularies are cut as the package itself cuts, whatever kind they are of."""

import copy
import io
import json
import pickle
import random

import pytest
import sentencepiece

from bdm.emoji.world import EmojiSource, World
from bdm.errors import UserError
from bdm.text.native import NativeTextEncoder, NativeTextSettings
from bdm.text.pieces import PieceRules, PieceTokenizer
from bdm.text.tokenizers import load_tokenizer

T5_ORDER = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
KINDS = {
    "t5": dict(model_type="unigram", **T5_ORDER),
    "default order": dict(model_type="unigram"),
    "bpe": dict(model_type="bpe", **T5_ORDER),
    "byte fallback": dict(model_type="bpe", byte_fallback=True, **T5_ORDER),
    "no dummy prefix": dict(model_type="unigram", add_dummy_prefix=False, **T5_ORDER),
    "blanks kept": dict(model_type="unigram", remove_extra_whitespaces=False, **T5_ORDER),
    "folded": dict(model_type="unigram", normalization_rule_name="nmt_nfkc_cf", **T5_ORDER),
    "as they are": dict(model_type="unigram", normalization_rule_name="identity"),
    "unknown last": dict(model_type="unigram", unk_id=3, pad_id=0, eos_id=2, bos_id=1),
    "suffix": dict(model_type="unigram", treat_whitespace_as_suffix=True, user_defined_symbols=["[X]"]),
}


@pytest.fixture(scope="module")
def captions():
    """Five thousand captions in seven scripts."""
    world, found = World(), []
    for language in ("zh", "ja", "ko", "en", "ru", "ar", "de"):
        source = EmojiSource(world, language)
        found += dict.fromkeys(source.caption(i) for i in range(len(source)))
    return found[:: len(found) // 5000][:5000]


RANGES = [
    (0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x206F), (0x3040, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFFFD), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF),
]  # fmt: skip
WORDS = ["</s>", "<pad>", "<extra_id_0>", "▁", " ", "　", "\n", "\t", "İ", "ß", "ﬁ", "e\u0301", "\0"]


def strange_texts(count=600):
    """Texts of all of Unicode: controls, blanks, marks, joiners, emoji, markers of tokenizers."""
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(
            draw.choice(WORDS) if draw.random() < 0.3 else chr(draw.randint(*draw.choice(RANGES)))
            for _ in range(draw.randint(0, 30))
        )


def train(captions, kind):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions[::3]), model_writer=written, vocab_size=2400, hard_vocab_limit=False,
        character_coverage=0.98, num_threads=1, minloglevel=2, **KINDS[kind],
    )  # fmt: skip
    return written.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_package(captions, kind, tmp_path):
    model = train(captions, kind)
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    ours, theirs = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert isinstance(ours, PieceTokenizer)
    for text in (*captions, *strange_texts()):
        assert ours(text, add_special_tokens=False).input_ids == theirs.encode(text), repr(text)
    assert len(ours) == theirs.get_piece_size()
    assert ours.unk_token_id == theirs.unk_id()
    assert ours("").input_ids == [theirs.piece_to_id("</s>")]
    assert max(ours.get_vocab().values()) == len(ours) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same_for_whatever_text(captions, kind):
    hypothesis = pytest.importorskip("hypothesis")
    model = train(captions, kind)
    ours, theirs = PieceTokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model)

    @hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.text())
    def same(text):
        assert ours.content(text) == theirs.encode(text)

    same()


def test_the_folder_may_ask_for_lower_case(captions, tmp_path):
    tokenizer = PieceTokenizer(train(captions, "t5"), PieceRules(lower_case=True, positions=9))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.rules == tokenizer.rules
    assert loaded("Ein ROTER Hund").input_ids == tokenizer("ein roter hund").input_ids
    assert (tmp_path / "spiece.model").read_bytes() == train(captions, "t5")


def test_xlm_r_moves_the_pieces_by_one(captions, tmp_path):
    """fairseq's order: <s>, <pad>, </s>, <unk>, then the file's own from its fourth on."""
    model = train(captions, "default order")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    ours, theirs = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (*captions[::10], *strange_texts(100)):
        moved = [3 if number == theirs.unk_id() else number + 1 for number in theirs.encode(text)]
        assert ours(text).input_ids == [0, *moved, 2], repr(text)
    assert (ours.pad_token_id, ours.unk_token_id) == (1, 3)
    assert ours.decode(ours("ein roter").input_ids) == theirs.decode(theirs.encode("ein roter"))
    ours.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")("ein").input_ids == ours("ein").input_ids


def test_padding_and_truncation_mean_what_they_mean_in_transformers(captions):
    tokenizer = PieceTokenizer(train(captions, "t5"), PieceRules(positions=8))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    batch = tokenizer(
        ["a", "a b c d e f g h i j k"], padding="max_length", truncation=True, return_tensors="pt"
    )
    assert batch.input_ids.shape == (2, 8)
    short = len(tokenizer("a").input_ids)
    assert batch.input_ids[0, short - 1 :].tolist() == [end, *[pad] * (8 - short)]
    assert batch.input_ids[1, -1] == end
    assert batch.attention_mask.sum(1).tolist() == [short, 8]
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other("a b c").input_ids == tokenizer("a b c").input_ids


def test_a_padding_piece_that_is_not_in_the_file_is_its_unknown_one(captions):
    tokenizer = PieceTokenizer(train(captions, "default order"))
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0


@pytest.mark.parametrize("content", [b"", b"no vocabulary", b"\0" * 64, b"PK\x03\x04" + b"x" * 999])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=r"spiece\.model is no SentencePiece vocabulary") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_half_a_file_is_refused(captions, tmp_path):
    (tmp_path / "spiece.model").write_bytes(train(captions, "t5")[:-100])
    with pytest.raises(UserError, match="is no SentencePiece vocabulary"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_in_one_file_is_read_as_that_file_says(captions, tmp_path):
    """transformers would rebuild it with T5's unknown id, and without its normalisation."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    theirs = sentencepiece.SentencePieceProcessor(model_proto=train(captions, "default order"))
    pieces = [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(len(theirs))]
    whole = Tokenizer(models.Unigram(pieces, 0, False))
    whole.normalizer = normalizers.Lowercase()
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<unk>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    ours = load_tokenizer(tmp_path)
    for text in ("Ein ROTER Hund", "ᚠ unknown", ""):
        assert ours(text).input_ids == whole.encode(text).ids


def test_a_text_encoder_keeps_its_vocabulary(captions, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = PieceTokenizer(train(captions, "folded"), PieceRules(positions=77))
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    encoder = NativeTextEncoder(model, tokenizer, NativeTextSettings(chunk_length=76))
    encoder.save_pretrained(tmp_path)
    loaded = NativeTextEncoder.from_pretrained(tmp_path)
    assert loaded.token_ids("Ein ROTER Hund") == tokenizer.content("ein roter hund")
    assert (loaded.encode(["Hund"]) == encoder.encode(["Hund"])).all()
