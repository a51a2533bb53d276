"""Native text in the text's place: what is trained, where it begins, what comes out."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import TEXT_DIM, make_native_model
from tiny_recipes import fresh, make_recipe, make_source, small_unet, write_stock
from transformers import BertConfig, BertModel

from bdm.config import RunConfig
from bdm.data.batch import fixed_batch
from bdm.errors import UserError
from bdm.models.backbone import load_backbone
from bdm.speed import lean_backward
from bdm.text.native import NativeTextEncoder
from bdm.text.vocabulary import chinese_clip_tokenizer
from bdm.training.loop import train
from bdm.training.recipes import text_slot
from bdm.training.recipes.backbone import backbone_recipe
from bdm.training.recipes.build import build_recipe
from bdm.training.recipes.native_text import native_text_recipe
from bdm.training.states import load_state


def config(out, recipe, **optimizer):
    own = dict(steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=0, ema_decay=0.5, schedule="constant")
    often = dict(log_every=1, validate_every=100, grid_every=100, checkpoint_every=2, trackers=())
    data = dict(kind="emoji", language="zh", limit=4)
    return RunConfig(out=out, recipe=recipe, data=data, optimizer=own | optimizer, seed=3, **often)


def built(run):
    """The recipe, without the figures that cost most."""
    recipe = build_recipe(run)
    recipe.validate, recipe.grid = dict, lambda: None
    return recipe


def ran(out, recipe, **optimizer):
    run = config(out, recipe, **optimizer)
    out.mkdir()
    return train(run, built(run))


def weights(folder):
    """All weights of a finished model, by file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*.safetensors"))
    }


def grown(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


CHOICES = [("text_encoder",), ("connector",), ("text_encoder", "unet"), ("cross_attention",)]


@pytest.mark.parametrize("chosen", CHOICES, ids="+".join)
def test_what_is_trained_gets_gradients_and_the_rest_keeps_its_bits(folders, chosen):
    recipe = make_recipe("native_text", folders, train=chosen, empty_caption=0.5)
    recipe.train_parts()
    before = {name: weight.detach().clone() for name, weight in recipe.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in recipe.parameters() if p.requires_grad], lr=0.01)
    recipe(fixed_batch(recipe.source, 4, 0))["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in recipe.parameters())
    optimizer.step()
    changed = {name for name, weight in recipe.named_parameters() if not torch.equal(weight, before[name])}
    places = {
        "text_encoder": "denoiser.native_text_encoder.model.",
        "connector": "denoiser.native_text_encoder.connector.",
        "unet": "denoiser.unet.",
    }
    if chosen == ("cross_attention",):
        wanted = {n for n in before if ".attn2.to_k." in n or ".attn2.to_v." in n}
    else:
        wanted = {n for n in before if n.startswith(tuple(places[part] for part in chosen))}
    assert wanted
    assert changed == wanted


@pytest.mark.slow
def test_all_of_attn2_is_trained_if_asked(folders):
    recipe = make_recipe("native_text", folders, train=("cross_attention",), attention="all")
    recipe.train_parts()
    unet = recipe.denoiser.unet
    assert grown(unet) == {name for name, _ in unet.named_parameters() if ".attn2." in name}


def test_an_encoder_that_learns_leaves_evaluation_mode_and_a_frozen_one_does_not(folders):
    for part, expected in (("text_encoder", True), ("cross_attention", False)):
        recipe = make_recipe("native_text", folders, train=(part,))
        recipe.train_parts()
        recipe.train()
        assert recipe.denoiser.native_text_encoder.model.training == expected


def test_a_pooler_is_none_of_what_is_trained(folders, tmp_path):
    """Processes would wait for its gradients; the features are the same without it."""
    sizes = dict(hidden_size=TEXT_DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    bert = NativeTextEncoder(BertModel(BertConfig(vocab_size=21128, **sizes)), chinese_clip_tokenizer())
    assert bert.model.pooler is not None
    bert.save_pretrained(tmp_path / "bert")
    expected = bert.encode(["红灯笼"])
    recipe = native_text_recipe(make_source(), folders[0], str(tmp_path / "bert"))
    recipe.train_parts()
    recipe(fixed_batch(recipe.source, 2, 0))["loss"].backward()
    assert all(p.grad is not None for p in recipe.denoiser.native_text_encoder.model.parameters())
    torch.testing.assert_close(recipe.denoiser.native_text_encoder.eval().encode(["红灯笼"]), expected)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone and a finished stage 1."""
    path = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_stock(path / "backbone")
    own = fresh(path / "vocabulary")
    ran(path / "one", {"kind": "native_text", "backbone": str(path / "backbone"), "native_text_encoder": own})
    return path


@pytest.fixture
def stages(place):
    """The recipe of a stage 2 that begins with the raw weights and moments of stage 1."""
    start = {"run": str(place / "one"), "weights": "raw", "moments": True}
    own = {"kind": "native_text", "backbone": str(place / "backbone"), "start": start}
    return own | {"train": ["text_encoder", "unet"]}


def test_stage_2_begins_where_stage_1_ended(stages, place, tmp_path):
    """Raw weights and moments are those of its last state, averaged ones those of its model."""
    state = load_state(place / "one/states")
    recipe = built(config(tmp_path / "two", stages))
    for name, weight in recipe.denoiser.native_text_encoder.model.state_dict().items():
        assert torch.equal(weight, state["parts"]["text_encoder"][name])
    moments = recipe.moments()
    assert set(moments) == set(state["names"])
    assert all(
        torch.equal(moments[n]["exp_avg"], state["optimizer"]["state"][i]["exp_avg"])
        for i, n in enumerate(state["names"])
    )
    averaged = built(config(tmp_path / "two", stages | {"start": str(place / "one")}))
    saved = NativeTextEncoder.from_pretrained(place / "one/model/native_text_encoder")
    pairs = zip(
        averaged.denoiser.native_text_encoder.parameters(), saved.parameters(), strict=True
    )  # fmt: skip
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not averaged.moments()
    assert any(
        not torch.equal(weight, state["parts"]["text_encoder"][name])
        for name, weight in averaged.denoiser.native_text_encoder.model.state_dict().items()
    )


class Stop(Exception):
    pass


def test_a_stage_2_that_was_stopped_ends_as_the_one_that_was_not(stages, tmp_path):
    whole = ran(tmp_path / "whole", stages)
    run = config(tmp_path / "cut", stages)
    run.out.mkdir()
    recipe, calls = built(run), []
    plain = recipe.denoiser.predict

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) > 3:
            raise Stop
        return plain(*given, **named)

    recipe.denoiser.predict = stopping
    with pytest.raises(Stop):
        train(run, recipe)
    assert weights(train(run, built(run))) == weights(whole)


@pytest.mark.slow
def test_moments_change_the_first_step(stages, tmp_path):
    """They are used: without them the same weights take another way."""
    with_them = ran(tmp_path / "with", stages, steps=1)
    start = stages["start"] | {"moments": False}
    without = ran(tmp_path / "without", stages | {"start": start}, steps=1)
    name = "native_text_encoder/model.safetensors"
    assert weights(with_them)[name] != weights(without)[name]
    # The UNet had none.
    assert (
        weights(with_them)["unet/diffusion_pytorch_model.safetensors"]
        == (weights(without)["unet/diffusion_pytorch_model.safetensors"])
    )


def test_the_finished_model_is_a_pipeline_without_a_branch(stages, place, tmp_path):
    model = ran(tmp_path / "two", stages)
    index = json.loads((model / "model_index.json").read_text())
    assert index["branch"] == [None, None]
    assert index["native_text_encoder"][1] == "NativeTextEncoder"
    stock, after = load_backbone(place / "backbone"), load_backbone(model)
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(after, part).state_dict(), getattr(stock, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = json.loads((model / "card.json").read_text())
    pairs = [(after.unet.state_dict()[name], weight) for name, weight in stock.unet.state_dict().items()]
    changed = sum(not torch.equal(ours, theirs) for ours, theirs in pairs) / len(pairs)
    moved = torch.cat([(ours - theirs).flatten() for ours, theirs in pairs]).double().norm()
    relative = moved / torch.cat([theirs.flatten() for _, theirs in pairs]).double().norm()
    assert card["unet_tensors_changed"] == pytest.approx(changed, abs=1e-4)
    assert card["unet_tensors_changed"] > 0.9
    assert card["unet_relative_distance"] == pytest.approx(relative.item(), abs=1e-6)
    assert card["samples"] == 8
    first = json.loads((place / "one/model/card.json").read_text())
    assert "unet_tensors_changed" not in first
    encoder = NativeTextEncoder.from_pretrained(model / "native_text_encoder")
    assert first["trained_parameters"] == sum(p.numel() for p in encoder.model.parameters())


def test_a_connector_is_saved_with_its_encoder(folders, tmp_path):
    recipe = make_recipe("native_text", folders)
    recipe.save(tmp_path / "out")
    read = NativeTextEncoder.from_pretrained(tmp_path / "out/native_text_encoder")
    assert read.text_dim == TEXT_DIM
    ours = recipe.denoiser.native_text_encoder
    torch.testing.assert_close(read.encode(["红灯笼"]), ours.encode(["红灯笼"]), rtol=0, atol=0)
    with pytest.raises(UserError, match="another text encoder's connector"):
        NativeTextEncoder(make_native_model(), chinese_clip_tokenizer()).save_pretrained(
            tmp_path / "out/native_text_encoder"
        )
    path = tmp_path / "out/native_text_encoder/connector/config.json"
    path.write_text(path.read_text().replace('"hidden": 8', '"hidden": 9'))
    with pytest.raises(UserError, match="not those that its config.json describes"):
        NativeTextEncoder.from_pretrained(path.parents[1])


def test_from_scratch_a_unet_and_its_native_encoder_learn_together(folders, tmp_path):
    own = fresh(tmp_path / "voc")
    recipe = backbone_recipe(
        make_source(),
        f"{folders[0]}/vae",
        unet=small_unet(),
        native_text_encoder=own,
        train_text_encoder=True,
    )
    recipe.train_parts()
    recipe(fixed_batch(recipe.source, 2, 0))["loss"].backward()
    assert all(
        p.grad is not None for part in ("unet", "text_encoder") for p in recipe.parts()[part].parameters()
    )
    recipe.save(tmp_path / "out")
    assert not (tmp_path / "out/text_encoder").exists()
    again = native_text_recipe(make_source(), folders[0], start=str(tmp_path / "out"), train=("unet",))
    ours, theirs = again.denoiser.unet.state_dict(), recipe.denoiser.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refused(run, message):
    """One line, and nothing written."""
    with pytest.raises(UserError, match=message) as error:
        build_recipe(run)
    assert "\n" not in str(error.value)
    assert not run.out.exists()


def test_what_cannot_be_trained_is_refused(folders, tmp_path):
    own, base = fresh(tmp_path / "voc"), {"kind": "native_text", "backbone": folders[0]}
    out = tmp_path / "out"
    refused(config(out, base | {"native_text_encoder": folders[1]}), f"48 wide and the UNet reads {TEXT_DIM}")
    refused(config(out, base | {"start": str(tmp_path / "none")}), "holds no finished run")
    # A backbone is no earlier stage.
    refused(config(out, base | {"start": folders[0]}), "whose model has a native_text_encoder")
    refused(
        config(out, base | {"native_text_encoder": own | {"vocabulary": str(tmp_path)}}),
        "holds no vocabulary",
    )
    wide = own | {"model": {"num_attention_heads": 3}}
    refused(config(out, base | {"native_text_encoder": wide}), "describes no text encoder")
    for recipe, message in (
        (
            {"native_text_encoder": own, "train": ["text_encoder", "unet"]},
            "train the text encoder alone first",
        ),
        ({"native_text_encoder": own, "start": "x"}, "one of the two"),
        ({"native_text_encoder": folders[1], "train": ["unet", "cross_attention"]}, "a part of it"),
        ({"native_text_encoder": own, "train": ["connector"]}, "the text encoder is untrained"),
    ):
        with pytest.raises(ValueError, match=message):
            config(out, base | recipe)
    moments = {"start": {"run": "x", "moments": True}}
    with pytest.raises(ValueError, match="only adamw goes on"):
        config(out, base | moments, name="prodigy")


class Prepared:
    """Data that say what prepared them."""

    origin = "shards/"

    def __init__(self, source, **models):
        self._source = source
        self.fingerprints = {part: {"source": "x", "fingerprint": "0123456789ab"} for part in models}

    def __len__(self):
        return len(self._source)

    def __getattr__(self, name):
        return getattr(self._source, name)


def test_prepared_features_are_no_use_for_an_encoder_that_is_trained(folders):
    options = dict(connector={}, train=("text_encoder",))
    with pytest.raises(UserError, match=r"features of texts by x \(0123456789\).*trains its text encoder"):
        native_text_recipe(Prepared(make_source(), text_encoder=1), *folders, **options)
    with pytest.raises(UserError, match="prepared with other models: its tokenizer"):
        native_text_recipe(Prepared(make_source(), tokenizer=1), *folders, **options)


def test_a_frozen_unet_keeps_less_and_gives_the_same_gradients(folders, monkeypatch):
    """Beside the same recipe whose UNet keeps everything."""
    monkeypatch.setattr(lean_backward, "LEAST_VALUES", 0)
    kept: dict[str, int] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, context in (("lean", lean_backward.lean_backward), ("plain", lambda unet: nullcontext())):
        monkeypatch.setattr(text_slot, "lean_backward", context)
        torch.manual_seed(0)
        recipe = make_recipe("native_text", folders, train=("text_encoder", "connector"), empty_caption=0.0)
        recipe.train_parts()
        sizes: list[int] = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        batch = fixed_batch(recipe.source, 2, 0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = recipe(batch)["loss"]
        loss.backward()
        kept[name] = sum(sizes)
        gradients[name] = [p.grad for p in recipe.parameters() if p.grad is not None]
    assert kept["lean"] < 0.9 * kept["plain"]
    assert len(gradients["lean"]) == len(gradients["plain"]) > 4
    for ours, theirs in zip(gradients["lean"], gradients["plain"]):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=3e-5)
