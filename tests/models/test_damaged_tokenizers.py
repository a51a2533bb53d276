"""A backbone's folder whose tokenizer is damaged or another model's is refused in one line."""

import json

import pytest
import torch
from tiny import make_text_encoder, make_unet, make_vae

from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.text.vocabulary import clip_tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """CLIP's tokens with their numbers, its merges, and its tokenizer in one file."""
    folder = tmp_path_factory.mktemp("clip")
    clip_tokenizer().save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return whole["model"]["vocab"], [" ".join(pair) for pair in whole["model"]["merges"]], whole


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    for name, part in {"unet": make_unet(), "vae": make_vae(), "text_encoder": make_text_encoder()}.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "tokenizer").mkdir()
    return tmp_path


def write(model, tokens, merges):
    (model / "tokenizer" / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (model / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")


def test_both_forms_are_read(model, vocabulary):
    tokens, merges, whole = vocabulary
    expected = clip_tokenizer()("a cat, 龙").input_ids
    write(model, tokens, merges)
    tokenizer = load_backbone(model).tokenizer
    assert tokenizer("a cat, 龙").input_ids == expected
    assert tokenizer.model_max_length == 77  # which no file of these says
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink()
    (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    assert load_backbone(model).tokenizer("a cat, 龙").input_ids == expected
    (model / "tokenizer" / "tokenizer.json").unlink()
    assert load_backbone(model).tokenizer("a cat, 龙").input_ids == expected  # the package's


def first(tokens, count):
    return dict(list(tokens.items())[:count])


DAMAGES = {
    "fewer tokens": lambda t, m: (first(t, 30_000), m),
    "fewer merges": lambda t, m: (t, m[:30_000]),
    "no merges": lambda t, m: (t, []),
    "a merge cut short": lambda t, m: (t, [*m[:-1], m[-1].split(" ")[0]]),
    "one token more": lambda t, m: (t | {"dragon</w></w>": len(t)}, m),
    "one merge more": lambda t, m: (t, [*m, "drag on</w></w>"]),
    "one merge and its token more": lambda t, m: (t | {"ab!</w>": len(t)}, [*m, "ab !</w>"]),
    "less of both": lambda t, m: (
        {k: i for i, k in enumerate([*first(t, 30_000), *list(t)[-2:]])}, m[: 30_000 - 512]),
    "a number twice": lambda t, m: (t | {"cat</w>": 5}, m),
    "numbers as texts": lambda t, m: ({key: str(number) for key, number in t.items()}, m),
    "numbers as truth": lambda t, m: (t | {"cat</w>": True}, m),
    "a list": lambda t, m: (list(t), m),
    "nothing": lambda t, m: ({}, []),
    "no markers": lambda t, m: (first(t, len(t) - 2), m),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", ["two files", "one file"])
def test_damaged_vocabularies_are_refused(model, vocabulary, damage, form):
    tokens, merges, whole = vocabulary
    tokens, merges = DAMAGES[damage](tokens, merges)
    if form == "two files":
        write(model, tokens, merges)
    else:
        content = whole | {"model": whole["model"] | {"vocab": tokens, "merges": merges}}
        (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    refused(model)


def refused(model):
    with pytest.raises(UserError) as error:
        load_backbone(model)
    assert "tokenizer" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[1]", b"\xff\xfe\x00", b"null", b'{"model": []}'], ids=repr
)
def test_files_of_no_vocabulary_are_refused(model, vocabulary, name, content):
    write(model, *vocabulary[:2])
    (model / "tokenizer" / name).write_bytes(content)
    refused(model)


def test_a_merges_file_that_is_not_there(model, vocabulary):
    write(model, *vocabulary[:2])
    (model / "tokenizer" / "merges.txt").unlink()
    refused(model)


def test_a_vocabulary_is_not_asked_for_where_it_is_not_used(model, vocabulary):
    write(model, {}, [])
    assert load_backbone(model, text_encoder=False).tokenizer is None
    assert load_backbone(model, tokenizer=clip_tokenizer()).tokenizer("a").input_ids[0] == 49406
