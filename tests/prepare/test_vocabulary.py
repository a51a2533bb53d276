"""Vocabularies out of training captions."""

import json

import pytest
from PIL import Image

from bdm.cli import main
from bdm.data.folder import FolderSource
from bdm.errors import UserError
from bdm.prepare.vocabulary import train_pieces, training_captions
from bdm.text.pieces import PieceTokenizer
from bdm.text.tokenizers import load_tokenizer
from bdm.text.vocabulary import clip_tokenizer

CAPTIONS = ["赤い提灯", "白い猫がいる", "A Red Lantern", "青い背景の月餅", "ﬁve ＡＢＣ"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(60):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        held_out = i % 12 == 0
        text = f"鬼瓦{i}" if held_out else f"{CAPTIONS[i % 5]} {i % 7}"
        rows.append({"file_name": f"{i}.png", "text": text, "other": f"別の言葉 {i % 3}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    config = tmp_path / "vocabulary.yaml"
    config.write_text(
        json.dumps({
            "out": str(tmp_path / "made"), "pieces": 120,
            "data": {"kind": "folder", "path": str(folder), "validation": 5},
        })
    )  # fmt: skip
    return config


def test_the_command_writes_a_vocabulary_that_text_encoders_read(data, tmp_path, capsys):
    assert main(["vocabulary", str(data)]) == 0
    made = tmp_path / "made"
    assert {path.name for path in made.iterdir()} == {
        "spiece.model", "tokenizer_config.json", "report.json", "report.txt", "report.png"
    }  # fmt: skip
    tokenizer = load_tokenizer(made)
    assert isinstance(tokenizer, PieceTokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 77
    source = FolderSource(data.parent / "data", validation=5)
    captions = [source.caption(i) for i in range(len(source))]
    assert not any(2 in tokenizer.content(caption) for caption in captions)
    # Case and width are folded by the file itself.
    assert tokenizer.content("Ａ RED lantern") == tokenizer.content("a red lantern")
    # What only validation captions hold is unknown: they were not read.
    assert 2 in tokenizer.content("鬼瓦")
    report = json.loads((made / "report.json").read_text())
    mean = sum(len(tokenizer.content(caption)) for caption in captions) / len(captions)
    assert report["training"]["SentencePiece"]["tokens_per_caption"] == pytest.approx(mean, abs=1e-3)
    clip = clip_tokenizer()
    ids = [clip(caption, add_special_tokens=False).input_ids for caption in captions]
    assert report["training"]["CLIP's byte pairs"]["longest"] == max(map(len, ids))
    assert report["training"]["SentencePiece"]["unknown"] == 0
    assert report["validation"]["SentencePiece"]["unknown"] > 0
    assert (made / "report.txt").read_text().strip() in capsys.readouterr().out


def test_the_same_captions_give_the_same_bytes():
    captions = [f"{one} {i}" for i in range(40) for one in CAPTIONS]
    made = train_pieces(captions, 150)
    assert train_pieces(captions, 150) == made
    assert train_pieces(captions[:-1], 150) != made


def test_all_captions_of_an_example_are_read(data):
    source = FolderSource(data.parent / "data", validation=5, captions={"text": 1.0, "other": 1.0})
    captions = training_captions(source)
    assert len(captions) == 2 * len(source)
    assert "別の言葉 1" in captions


def test_lines_and_long_captions_are_not_left_out():
    captions = [*("a\nb" for _ in range(30)), "龍" * 9000]
    tokenizer = PieceTokenizer(train_pieces(captions, 60))
    assert 2 not in tokenizer.content("龍 a b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["captions=validation"], "is trained on the training captions alone"),
        (["data={kind: emoji, held_out: only}"], "those captions are validation's"),
        (["data={kind: emoji, held_out: all}"], "those captions are validation's"),
        (["pieces=4"], "no vocabulary of 4 pieces can be made"),
        (["data.path=nowhere"], "no such file"),
    ],
)
def test_what_is_refused_in_a_line_with_nothing_written(data, tmp_path, capsys, overrides, message):
    assert main(["vocabulary", str(data), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".made*"))


def test_validation_examples_are_refused_as_such(data):
    source = FolderSource(data.parent / "data", validation=5)
    with pytest.raises(UserError, match="these are the validation captions"):
        training_captions(source.validation)


def test_a_folder_that_holds_a_vocabulary_stays_as_it_is(data, tmp_path, capsys):
    assert main(["vocabulary", str(data)]) == 0
    before = (tmp_path / "made" / "spiece.model").read_bytes()
    assert main(["vocabulary", str(data), "pieces=90"]) == 2
    assert "stay as they are" in capsys.readouterr().err
    assert (tmp_path / "made" / "spiece.model").read_bytes() == before
