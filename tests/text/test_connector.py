"""A connector: what it says of a token, what it refuses, and that states in front of it may be kept."""

import json

import pytest
import torch
from tiny import make_native_model

from bdm.config.recipe import CONNECTOR_HEAD, ConnectorConfig
from bdm.errors import UserError
from bdm.text.connector import HEAD_WIDTH, Connector, read_connector_config
from bdm.text.native import NativeTextEncoder, NativeTextSettings
from bdm.text.vocabulary import chinese_clip_tokenizer
from bdm.training.recipes.text_slot import with_connector

WIDTH_IN, WIDTH_OUT, TOKENS = 24, 16, 7


def made(**settings) -> NativeTextEncoder:
    torch.manual_seed(0)
    return NativeTextEncoder(
        make_native_model(), chinese_clip_tokenizer(), NativeTextSettings(chunk_length=TOKENS - 2), **settings
    )


@pytest.mark.parametrize(
    ("own", "mixes"), [({}, False), ({"hidden": 64}, False), ({"hidden": 64, "depth": 2}, True)]
)
def test_only_layers_let_a_token_hear_of_the_others(own, mixes):
    torch.manual_seed(0)
    connector = Connector(WIDTH_IN, WIDTH_OUT, **own, positions=TOKENS if mixes else 0).eval()
    features = torch.randn(2, TOKENS, WIDTH_IN)
    other = features.clone()
    other[:, 2] = torch.randn(2, WIDTH_IN)
    with torch.no_grad():
        before, after = connector(features), connector(other)
    assert before.shape == (2, TOKENS, WIDTH_OUT)
    heard = ~(before - after).abs().amax(-1).lt(1e-6)
    assert heard[:, 2].all()
    assert heard[:, torch.arange(TOKENS) != 2].all() == mixes
    # Equal tokens at two places are told apart by their place alone.
    alike = connector(features[:, :1].expand(-1, TOKENS, -1))
    assert torch.allclose(alike[:, 0], alike[:, 1], atol=1e-6) != mixes


def test_layers_are_saved_and_read_with_the_encoder(tmp_path):
    ours = with_connector(made(), WIDTH_OUT, hidden=64, depth=1)
    assert ours.connector.config["positions"] == TOKENS
    ours.save_pretrained(tmp_path)
    read = NativeTextEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(read.encode(["红灯笼"]), ours.encode(["红灯笼"]), rtol=0, atol=0)
    with pytest.raises(
        UserError, match=f"the connector reads {TOKENS}; use a chunk_length of at most {TOKENS - 2}"
    ):
        NativeTextEncoder.from_pretrained(tmp_path, NativeTextSettings(chunk_length=TOKENS - 1))
    shorter = NativeTextEncoder.from_pretrained(tmp_path, NativeTextSettings(chunk_length=TOKENS - 3))
    assert shorter.encode(["红灯笼"]).shape == (1, TOKENS - 1, WIDTH_OUT)


@pytest.mark.parametrize(
    "said",
    [
        {"depth": 1, "hidden": 0},
        {"depth": 1, "hidden": 65},
        {"depth": 1, "positions": 0},
        {"depth": -1},
        {"heads": 2},
    ],
)
def test_settings_that_make_no_connector_are_refused(tmp_path, said):
    place = tmp_path / "connector"
    Connector(WIDTH_IN, WIDTH_OUT, 64, 1, TOKENS).save_pretrained(place)
    path = place / "config.json"
    read = json.loads(path.read_text())
    assert read_connector_config(tmp_path)["depth"] == 1
    path.write_text(json.dumps({**read, **said}))
    with pytest.raises(UserError, match=r"says .*(depth|heads).*get the folder again"):
        read_connector_config(tmp_path)


def test_a_connector_without_a_depth_need_not_name_them(tmp_path):
    place = tmp_path / "connector"
    Connector(WIDTH_IN, WIDTH_OUT).save_pretrained(place)
    path = place / "config.json"
    path.write_text(json.dumps({"width_in": WIDTH_IN, "width_out": WIDTH_OUT, "hidden": 0}))
    assert Connector(**read_connector_config(tmp_path)).config["depth"] == 0


def test_layers_have_whole_heads():
    assert CONNECTOR_HEAD == HEAD_WIDTH
    for hidden in (0, 65):
        with pytest.raises(ValueError, match="multiple of 64"):
            ConnectorConfig(hidden=hidden, depth=1)


def test_kept_states_are_those_of_each_chunk_alone_and_computed_once():
    encoder = with_connector(made(), WIDTH_OUT, hidden=64, depth=1)
    texts = ["红灯笼", "一只可爱的小狗在跑", "红灯笼", ""]
    alone = [encoder.encode_each([text])[0] for text in texts]
    asked: list[int] = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, given: asked.append(len(given["input_ids"])), with_kwargs=True
    )
    encoder.keep_states = True
    encoder.connector.requires_grad_(True)
    for _ in range(2):
        found = encoder.encode_each(texts)
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # The two chunks of the long text, the lantern and the empty one, which also fills shorter texts up.
    assert asked == [1] * 4
    assert found[0].requires_grad


def test_kept_states_go_when_the_encoder_is_cast():
    encoder, fresh = (with_connector(made(), WIDTH_OUT, hidden=64, depth=1) for _ in range(2))
    encoder.keep_states = True
    encoder.encode(["红灯笼"])
    for one in (encoder, fresh):
        one.to(torch.float64)
    found = encoder.encode(["红灯笼"])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, fresh.encode(["红灯笼"]), rtol=1e-12, atol=1e-12)
