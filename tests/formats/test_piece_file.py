"""SentencePiece vocabularies are told by their bytes, and nothing else is taken for one."""

import io

import pytest

from bdm.errors import UserError
from bdm.formats.identify import describe_file
from bdm.formats.piece_file import piece_facts

sentencepiece = pytest.importorskip("sentencepiece")
TEXTS = [f"{a}{b}，{c}色背景" for a in "红蓝绿黄" for b in "灯笼伞猫狗龙" for c in "红白黑"]


def trained(kind, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type=kind, vocab_size=400,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(("kind", "named"), [("unigram", "unigram"), ("char", "characters")])
def test_a_vocabulary_says_how_many_pieces_it_has_and_of_which_kind(tmp_path, kind, named):
    path = tmp_path / "spiece.model"
    path.write_bytes(trained(kind))
    facts = describe_file(path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert facts["kind"] == "SentencePiece vocabulary"
    assert facts["pieces"] == str(own.get_piece_size())
    assert facts["model"] == named
    assert facts["normalization"] == "nmt_nfkc"


def test_bytes_for_unknown_characters_are_told(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(trained("unigram", byte_fallback=True))
    assert "bytes for unknown characters" in describe_file(path)["model"]


def test_what_is_no_vocabulary_is_none(tmp_path):
    path, whole = tmp_path / "a.model", trained("unigram")
    for wrong in (whole[:-3], whole[:100], b"\n", b"\nhello", b"\n\x02\x08\x01", whole + b"\xff", b"\n" * 64):
        path.write_bytes(wrong)
        assert piece_facts(path) is None
        with pytest.raises(UserError):
            describe_file(path)
