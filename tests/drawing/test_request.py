"""One request: its JSON gives it back, and what is not known is refused by name."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdm import BranchUse, FileRef, Mode, PluginUse, PromptRules, Request
from bdm.drawing.request import KINDS, PRECISIONS, Versions
from bdm.errors import UserError
from bdm.speed.approximate import Approximation

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
shares = st.floats(0, 1, allow_subnormal=False)
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
files = st.builds(FileRef, texts, texts)


def at_most_one_ip_adapter(plugins):
    return sum(plugin.kind == "ip_adapter" for plugin in plugins) <= 1


plugins = st.builds(
    PluginUse,
    kind=st.sampled_from(KINDS),
    file=files,
    name=texts,
    strength=numbers,
    text_strength=st.none() | numbers,
    start=shares,
    end=shares,
    pooled=st.none() | st.booleans(),
    picture=st.none() | files,
    annotator=st.none() | texts,
)
modes = st.builds(
    Mode,
    st.sampled_from(["text", "image", "mask"]),
    st.dictionaries(texts, files, max_size=2).map(lambda d: tuple(sorted(d.items()))),
    st.dictionaries(texts, st.integers(-9, 9) | numbers | texts | st.booleans(), max_size=3).map(
        lambda d: tuple(sorted(d.items()))
    ),
)
requests = st.builds(
    Request,
    prompt=texts,
    negative=texts,
    prompt_en=texts,
    negative_en=texts,
    seed=st.integers(0, 2**63 - 1),
    width=st.none() | st.integers(8, 4096),
    height=st.none() | st.integers(8, 4096),
    enlarge=st.integers(1, 9),
    mode=modes,
    model=st.none() | files,
    branch=st.none() | files,
    beside=st.lists(st.builds(BranchUse, file=files, prompt=texts, scale=numbers), max_size=2).map(tuple),
    plugins=st.lists(plugins, max_size=3).filter(at_most_one_ip_adapter).map(tuple),
    sampler=texts,
    schedule=texts,
    steps=st.integers(1, 200),
    guidance=st.none() | numbers | st.integers(0, 20),
    english_guidance=st.none() | numbers,
    clip_skip=st.integers(1, 12),
    rules=st.builds(
        PromptRules,
        st.sampled_from(["a1111", "official"]),
        st.sampled_from(["a1111", "official"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["kept", "full", "half"]),
    ),
    world=st.none() | shares,
    branch_scale=numbers,
    branch_start=shares,
    branch_end=shares,
    branch_schedule=texts,
    approximation=st.builds(Approximation, branch_every=st.integers(1, 5), deep_every=st.integers(1, 5)),
    precision=st.none() | st.sampled_from(PRECISIONS),
    versions=st.builds(Versions, texts, texts, texts, texts, texts, st.integers(1, 64)),
)


@given(requests)
def test_json_gives_the_request_back(request):
    said = json.dumps(request.to_json(), ensure_ascii=False)
    again = Request.from_json(said)
    assert again == request
    assert again.to_json() == request.to_json()
    assert hash(again) == hash(request)


@given(requests)
def test_every_field_is_in_the_json(request):
    assert set(request.to_json()) == {field.name for field in dataclasses.fields(Request)}


WRONG = [
    ({"promt": "龙"}, "says 'promt'; allowed are prompt, negative"),
    ({"prompt": 3}, "prompt, is 3; give a text"),
    ({"seed": "1"}, "seed, is '1'; give a whole number"),
    ({"seed": True}, "seed, is True; give a whole number"),
    ({"seed": -1}, "seed -1: give a whole number from 0"),
    ({"steps": 0}, "steps 0: give a whole number from 1"),
    ({"steps": 2.5}, "steps, is 2.5; give a whole number"),
    ({"guidance": float("nan")}, "guidance, is nan; give a finite number"),
    ({"guidance": "7"}, "guidance, is '7'; give a number"),
    ({"plugins": {}}, "plugins, is {}; give a list"),
    ({"plugins": [{"kind": "adapter"}]}, "item 1 does not say file"),
    ({"plugins": [{"kind": "lora", "file": {"name": "a"}}]}, "kind 'lora'; allowed are checkpoint"),
    (
        {"plugins": [{"kind": "adapter", "file": {"name": "a", "path": "/a"}}]},
        "says 'path'; allowed are name",
    ),
    ({"mode": "text"}, "mode is 'text'; give an object"),
    ({"mode": {"name": "text", "strenght": 1}}, "says 'strenght'; allowed are name, pictures, settings"),
    ({"mode": {"name": "text", "settings": {"a": []}}}, "a, is []; give a number or a text"),
    ({"precision": "fp8"}, "precision 'fp8'; allowed are fp32"),
    ({"prompt": "龙\ud83d"}, "holds half a character"),
    ([], "the request is []; give an object"),
    ("{", "is not JSON"),
]


@pytest.mark.parametrize(("said", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_not_known_is_refused_by_name(said, message):
    with pytest.raises(UserError) as caught:
        Request.from_json(said)
    assert message in str(caught.value)


def test_what_decides_a_picture():
    """Versions and names of files do not; hashes, strengths and an embedding's word do."""
    ink = PluginUse(kind="adapter", file=FileRef("ink.safetensors", "abc"), name="ink", strength=0.5)
    mood = PluginUse(kind="embedding", file=FileRef("mood.pt", "def"), name="mood")
    one = Request(prompt="龙", plugins=[ink, mood], model=FileRef("emoji", "123"))
    renamed = dataclasses.replace(ink, name="other", file=FileRef("other.safetensors", "abc"))
    same = dataclasses.replace(
        one, plugins=(renamed, mood), versions=Versions("9"), model=FileRef("x", "123")
    )
    assert same != one
    assert same.essence() == one.essence()
    for change in (
        {"plugins": (dataclasses.replace(ink, strength=0.6), mood)},
        {"plugins": (dataclasses.replace(ink, file=FileRef("ink.safetensors", "abd")), mood)},
        {"plugins": (ink, dataclasses.replace(mood, name="calm"))},
        {"plugins": (mood, ink)},
        {"seed": 1},
        {"prompt": "虎"},
        {"branch": FileRef("trained", "1")},
        {"beside": (BranchUse(file=FileRef("other", "1"), prompt="月饼"),)},
        {"mode": Mode("image", (("image", FileRef("a.png", "1")),))},
    ):
        assert dataclasses.replace(one, **change).essence() != one.essence(), change


def test_a_path_stays_on_this_machine(tmp_path):
    file = FileRef.to(tmp_path / "ink.safetensors")
    assert str(tmp_path) not in json.dumps(Request(plugins=[PluginUse(kind="adapter", file=file)]).to_json())
    assert file.source == tmp_path / "ink.safetensors"
    assert FileRef.to("owner/model").name == "owner/model"
    assert FileRef.to("assets/emoji").name == "emoji"
