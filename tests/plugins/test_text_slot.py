"""Plug-ins where native text is in English's place: the UNet's part acts, text parts wait for English."""

import json
import logging

import pytest
import torch
from agreement import outputs_agree
from community_files import write_original
from released_folders import japanese
from safetensors.torch import load_file, save_file
from tiny import TEXT_DIM, make_text_encoder, make_unet

import bdm
from bdm.errors import UserError
from bdm.text.vocabulary import clip_tokenizer

DRAW = dict(num_inference_steps=1, seed=0, output_type="latent")


@pytest.fixture
def native_pipe(tmp_path):
    """A released system, without English."""
    japanese(tmp_path / "released")
    pipe = bdm.BridgePipeline.from_pretrained(tmp_path / "released")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def state(pipe):
    return {
        (part, name): tensor.clone()
        for part in ("unet", "vae", "native_text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def changed(first, second):
    return {key for key in first if not torch.equal(first[key], second[key])}


def test_an_adapters_unet_acts_and_its_text_is_left_out_and_counted(native_pipe, files, caplog):
    before, plain = state(native_pipe), native_pipe("猫", **DRAW).images
    with caplog.at_level(logging.WARNING):
        plugin = native_pipe.plugins.attach(files["ink"], strength=0.5)
    assert "changes of 1 text modules is left out" in caplog.text.replace("are", "is")
    assert plugin.strength["unet"] == 0.5
    after = state(native_pipe)
    assert {key[0] for key in changed(before, after)} == {"unet"}
    # As much as the file without its text would change.
    alone = {k: t for k, t in load_file(files["ink"]).items() if k.startswith("lora_unet_")}
    save_file(alone, files["ink"].with_name("unet_alone.safetensors"))
    assert not torch.equal(native_pipe("猫", **DRAW).images, plain)
    native_pipe.plugins.detach("ink")
    assert same(state(native_pipe), before)
    caplog.clear()
    native_pipe.plugins.attach(files["ink"].with_name("unet_alone.safetensors"), strength=0.5)
    assert not caplog.records
    assert same(state(native_pipe), after)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.text_encoder.encoder.layers.1.mlp.fc2",
        "clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj",
        "lycoris_te_encoder_layers_0_mlp_fc1",
    ],
)
def test_text_parts_are_known_however_they_are_called(native_pipe, tmp_path, caplog, key):
    path = tmp_path / "one.safetensors"
    save_file(
        {
            f"{key}.lora_down.weight": torch.randn(2, TEXT_DIM),
            f"{key}.lora_up.weight": torch.randn(TEXT_DIM, 2),
            "lora_unet_mid_block_attentions_0_proj_in.diff": torch.randn(32, 32, 1, 1),
        },
        path,
    )
    before = state(native_pipe)
    with caplog.at_level(logging.WARNING):
        native_pipe.plugins.attach(path)
    assert "changes of 1 text module" in caplog.text
    assert len(changed(before, state(native_pipe))) == 1


def test_an_embedding_is_left_out_and_counted(native_pipe, files, caplog):
    before = state(native_pipe)
    with caplog.at_level(logging.WARNING):
        plugin = native_pipe.plugins.attach(files["mood"])
    assert "an embedding of 3 vectors is left out" in caplog.text
    assert (plugin.kind, plugin.words) == ("embedding", ())
    assert same(state(native_pipe), before)
    native_pipe.plugins.detach("mood")


def test_bundled_embeddings_are_counted_too(native_pipe, files, tmp_path, caplog):
    tensors = load_file(files["ink"]) | {"bundle_emb.moody.emb_params": torch.randn(2, TEXT_DIM)}
    save_file(tensors, tmp_path / "bundle.safetensors")
    with caplog.at_level(logging.WARNING):
        native_pipe.plugins.attach(tmp_path / "bundle.safetensors")
    assert "changes of 1 text module and 1 embedding are left out" in caplog.text.replace("modules", "module")


def test_with_english_beside_it_text_parts_act_on_english_alone(files, tmp_path):
    japanese(tmp_path / "released")
    pipe = bdm.BridgePipeline.from_pretrained(
        tmp_path / "released", text_encoder=make_text_encoder(), tokenizer=clip_tokenizer()
    )
    native = {k: t.clone() for k, t in pipe.native_text_encoder.state_dict().items()}
    english = {k: t.clone() for k, t in pipe.text_encoder.state_dict().items()}
    pipe.plugins.attach(files["ink"])
    pipe.plugins.attach(files["mood"])
    assert pipe.plugins["mood"].words == ("mood",)
    assert same(native, pipe.native_text_encoder.state_dict())
    now = pipe.text_encoder.state_dict()
    assert [k for k in english if english[k].shape != now[k].shape or not torch.equal(english[k], now[k])]


@pytest.fixture
def models(files, tmp_path):
    """SD1.5's stand-in, and a checkpoint that was trained from it; only the first is at hand as an object."""
    torch.manual_seed(11)
    base = type("Base", (), {"unet": make_unet(), "vae": None, "text_encoder": make_text_encoder()})()
    from tiny import make_vae

    base.vae = make_vae()
    write_original(base, tmp_path / "sd15.safetensors")
    return base, tmp_path / "sd15.safetensors", files["style"]


def test_a_checkpoint_is_attached_as_its_difference(native_pipe, models, caplog):
    base, sd15, style = models
    before = state(native_pipe)
    with pytest.raises(UserError, match=r"attach it as a difference: base= the SD1\.5 model") as said:
        native_pipe.plugins.attach(style)
    assert "\n" not in str(said.value)
    assert same(state(native_pipe), before)
    with caplog.at_level(logging.WARNING):
        plugin = native_pipe.plugins.attach(style, base=sd15, strength=0.5)
    assert "weights of its text encoder are left out" in caplog.text
    assert plugin.strength == {"unet": 0.5}

    def expected(share):
        from bdm.formats.checkpoint import read_parts

        theirs = read_parts(style).weights["unet"]
        return {
            name: before["unet", name] + share * (theirs[name] - weight)
            for name, weight in base.unet.state_dict().items()
        }

    for share in (0.5, 1.0, 0.0):
        native_pipe.plugins.set_strength("style", share)
        now = native_pipe.unet.state_dict()
        for name, weight in expected(share).items():
            outputs_agree(now[name], weight, name)
    native_pipe.plugins.detach("style")
    assert same(state(native_pipe), before)


def test_on_sds_own_unet_difference_and_replacement_are_one(pipe, models, tmp_path):
    """A branch pipeline whose UNet is the base: base + (checkpoint - base) is the checkpoint."""
    base, sd15, style = models
    pipe.unet.load_state_dict(base.unet.state_dict())
    pipe.plugins.attach(style, "replaced")
    replaced = {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    pipe.plugins.detach("replaced")
    pipe.plugins.attach(style, "added", base=sd15)
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, replaced[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "takes a strength only as a difference"),
        ({"base": "nowhere"}, "nowhere"),
        ({"base": "ink"}, "allowed here: checkpoint"),
        ({"base": "sd15", "strength": float("nan")}, "not a finite number"),
        ({"base": "other"}, "unknown weights|misses|has shape"),
        ({"base": "sd15", "text_strength": 1.0}, "takes no setting 'text_strength'"),
    ],
)
def test_what_is_no_base_is_refused(native_pipe, models, files, tmp_path, settings, message):
    other = type("Other", (), {"unet": make_unet(cross_attention_dim=24), "vae": None, "text_encoder": None})
    made = models[0]
    other.vae, other.text_encoder = made.vae, made.text_encoder
    write_original(other(), tmp_path / "other.safetensors")
    places = {"sd15": models[1], "ink": files["ink"], "other": tmp_path / "other.safetensors"}
    before = state(native_pipe)
    given = {key: places.get(value, value) if key == "base" else value for key, value in settings.items()}
    with pytest.raises(UserError, match=message) as said:
        native_pipe.plugins.attach(models[2], **given)
    assert "\n" not in str(said.value)
    assert same(state(native_pipe), before)
    assert len(native_pipe.plugins) == 0


def test_a_moved_unet_is_known_after_saving_and_by_its_card(native_pipe, models, tmp_path):
    native_pipe.save_pretrained(tmp_path / "saved")
    again = bdm.BridgePipeline.from_pretrained(tmp_path / "saved")
    assert again.moved_unet == native_pipe.moved_unet != ""
    assert bdm.BridgeImg2ImgPipeline.from_pipe(again).moved_unet == native_pipe.moved_unet
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    del index["_moved_unet"]
    (tmp_path / "saved" / "model_index.json").write_text(json.dumps(index))
    assert bdm.BridgePipeline.from_pretrained(tmp_path / "saved").moved_unet == ""
    (tmp_path / "saved" / "card.json").write_text(json.dumps({"unet_tensors_changed": 0.5}))
    moved = bdm.BridgePipeline.from_pretrained(tmp_path / "saved")
    assert "50% of the tensors were changed" in moved.moved_unet
    with pytest.raises(UserError, match="base="):
        moved.plugins.attach(models[2])
    (tmp_path / "saved" / "card.json").write_text(json.dumps({"unet_tensors_changed": 0.0}))
    # Stage 1 leaves the UNet what it was: a checkpoint takes its place as ever.
    first = bdm.BridgePipeline.from_pretrained(tmp_path / "saved")
    first.plugins.attach(models[2])


def test_a_controlnet_acts_as_ever(native_pipe, files):
    from PIL import Image

    plain = native_pipe("猫", **DRAW).images
    native_pipe.plugins.attach(files["edges"])
    controlled = native_pipe("猫", control_images=Image.new("RGB", (64, 64), "white"), **DRAW).images
    assert not torch.equal(controlled, plain)
    native_pipe.plugins.detach("edges")
    assert torch.equal(native_pipe("猫", **DRAW).images, plain)
