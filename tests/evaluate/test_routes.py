"""Routes side by side: drawn alike, scored alike, on tiny models."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_native_model, make_unet
from tiny_recipes import fresh, make_source, write_stock

from bdm.config import RouteConfig, RoutesConfig, RunConfig
from bdm.emoji.judge import JudgeModel
from bdm.emoji.world import World
from bdm.errors import UserError
from bdm.evaluate import routes
from bdm.evaluate.combinations import NAMES
from bdm.evaluate.route import open_route, world_translation
from bdm.evaluate.route_facts import as_it_was, kept_states, token_facts, unet_facts
from bdm.evaluate.routes import english_trial, evaluate_routes, route_trials
from bdm.method.branch import BranchModel
from bdm.models.backbone import load_backbone
from bdm.text.native import NativeTextEncoder
from bdm.text.translate import TableTranslation, read_translation
from bdm.text.vocabulary import chinese_clip_tokenizer
from bdm.training.loop import train
from bdm.training.recipes.build import build_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone, a branch on it, and a text encoder in the text's place that learned for a few steps."""
    path = tmp_path_factory.mktemp("routes")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_stock(path / "backbone")
    NativeTextEncoder(make_native_model(), chinese_clip_tokenizer()).save_pretrained(path / "native")
    BranchModel.from_backbone(make_unet(), 48).save_pretrained(path / "branch")
    treatments = ("plain", "outlined", "sealed", "outlined_sealed")
    encoder = fresh(path / "vocabulary")
    JudgeModel(640, 8, 8, 64, treatments).save_pretrained(path / "judge")
    run = RunConfig(
        out=path / "text",
        recipe=dict(
            kind="native_text", backbone=str(path / "backbone"), native_text_encoder=encoder
        ),
        data=dict(kind="emoji", limit=4),
        optimizer=dict(steps=4, batch_size=2, learning_rate=1e-2, warmup_steps=0),
        trackers=(), checkpoint_every=2, keep_every=2, log_every=2, validate_every=9, grid_every=9,
    )  # fmt: skip
    run.out.mkdir()
    recipe = build_recipe(run)
    recipe.validate, recipe.grid = dict, lambda: None
    train(run, recipe)
    return path


def text_route(place):
    return open_route("text", RouteConfig(model=str(place / "text/model")), World(), "zh", None)


def config(place, out, **changes):
    backbone = str(place / "backbone")
    branch = dict(model=backbone, branch=str(place / "branch"), native_text_encoder=str(place / "native"))
    text = dict(model=str(place / "text/model"), history=place / "text", shuffled=str(place / "text/model"))
    own = dict(
        kind="routes", out=out, base=backbone, judge=str(place / "judge"), language="zh", steps=1,
        guidances=(2.0,), controls=3, batch=4, reference="text",
        routes={"branch": branch, "text": text, "translate": dict(model=backbone, translate="world")},
    )  # fmt: skip
    return RoutesConfig(**own | changes)


def few(make):
    """A few prompts of each trial."""

    def fewer(*given):
        made = make(*given)
        return {name: cut(trial) for name, trial in made.items()} if isinstance(made, dict) else cut(made)

    def cut(trial):
        step = max(1, len(trial.native) // 5)
        colours = trial.colours[::step] if trial.colours else None
        parts = {name: getattr(trial, name)[::step] for name in ("native", "english", "concepts")}
        return replace(trial, colours=colours, **parts)

    return fewer


def test_all_routes_come_into_one_table_and_one_picture(place, tmp_path, monkeypatch, files):
    monkeypatch.setattr(routes, "route_trials", few(route_trials))
    monkeypatch.setattr(routes, "english_trial", few(english_trial))
    monkeypatch.setattr(routes, "ROUNDS", 1)
    plugins = dict(
        checkpoint=str(files["style"]), lora=str(files["ink"]), controlnet=str(files["edges"]),
        embedding=str(files["mood"]), lora_trigger="ink", embedding_colour="purple",
    )  # fmt: skip
    out = tmp_path / "compare"
    result = evaluate_routes(config(place, out, plugins=plugins))
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    rows = result["routes"]
    assert rows.keys() == {"branch", "text", "translate"}
    for row in rows.values():
        assert all(f"{name}_se" in row for name in ("top1", "native_top1", "held_out_pairs", "native_look"))
        assert row["unet_tensors_changed"] == 0
        assert row["english_kept"] == result["backbone"]["english_kept"]
        shown = {name for name in NAMES if f"{name}_effect" in row}
        assert shown >= {"lora", "controlnet", "embedding"}
        # One that a route cannot take is said in a line.
        assert shown | row["plugins_refused"].keys() == set(NAMES)
    assert rows["text"]["samples"] == 8
    assert rows["text"]["samples_to_50"] in (4, 8, None)
    assert rows["text"]["trained_parameters"] > 0
    assert rows["branch"]["trained_parameters"] > rows["text"]["trained_parameters"]
    assert rows["translate"]["trained_parameters"] == 0
    assert "control_shuffled_top1" in rows["text"]
    report = (out / "report.md").read_text()
    assert all(title in report for title in ("| branch |", "| text |", "| translate |", "lora, effect"))
    assert (out / "routes.png").exists()


def test_a_route_draws_what_a_stock_pipeline_draws_of_its_features(place):
    from bdm.evaluate.route import stock_pipeline

    route = text_route(place)
    trial = few(english_trial)(World(), 2, 0)
    trial = replace(trial, native=["红灯笼", "猫"], english=["", ""])
    pictures = route.draw(trial, 2, 3.0, 2, 5)
    features = route.native.encode(["猫", ""])
    alone = stock_pipeline(route.pipe)(
        prompt_embeds=features[:1], negative_prompt_embeds=features[1:], num_inference_steps=2,
        guidance_scale=3.0, generator=[torch.Generator().manual_seed(6)], output_type="pt",
    ).images * 2 - 1  # fmt: skip
    torch.testing.assert_close(pictures[1:], alone, atol=1e-4, rtol=1e-4)


def test_how_fast_it_learned_is_read_off_its_states(place):
    route = text_route(place)
    own = {name: weight.clone() for name, weight in route.native.model.state_dict().items()}
    (first, path), (last, end) = kept_states(place / "text")
    assert (first, last) == (4, 8)
    state = torch.load(path, weights_only=True)
    with as_it_was(route, path):
        weights = dict(route.native.model.named_parameters())
        for name, average in zip(state["names"], state["ema"]["average"], strict=True):
            assert torch.equal(weights[name.removeprefix("text_encoder.")], average)
    assert all(torch.equal(own[name], weight) for name, weight in route.native.model.state_dict().items())
    with as_it_was(route, end):  # the finished model's
        assert all(torch.equal(own[name], w) for name, w in route.native.model.state_dict().items())
    with pytest.raises(UserError, match="holds no states"):
        kept_states(place)


def test_facts_of_a_moved_unet_and_of_captions(place):
    route, base = text_route(place), load_backbone(place / "backbone")
    assert unet_facts(route, base) == {"unet_tensors_changed": 0, "unet_relative_distance": 0}
    with torch.no_grad():
        for weight in route.pipe.unet.parameters():
            weight.mul_(1.1)
    moved = unet_facts(route, base)
    moving = [bool(weight.any()) for weight in base.unet.state_dict().values()]
    assert moved["unet_tensors_changed"] == pytest.approx(sum(moving) / len(moving), abs=1e-4)
    assert moved["unet_relative_distance"] == pytest.approx(0.1, abs=1e-4)
    known = make_source().caption(0)
    assert token_facts(route, [known, known + "龘"]) == {"tokens": len(known) + 0.5, "unknown": 0.5}


def test_a_dictionary_says_every_caption_of_the_world():
    world = World()
    for language in ("zh", "ja"):
        translate = world_translation(world, language)
        asked = [(i, colour) for i in range(0, len(world.concepts), 7) for colour in (None, "red")]
        native = [world.caption(i, colour, language) for i, colour in asked]
        assert translate(native) == [world.caption(i, colour, "en") for i, colour in asked]


def test_tables_are_read_and_what_is_none_is_refused(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text("红灯笼\tred lantern\n灯\tlamp\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps({"红灯笼": "red lantern", "灯": "lamp"}))
    for name in ("a.tsv", "a.json"):
        assert read_translation(tmp_path / name)(["红灯笼", "大灯", ""]) == ["red lantern", "大lamp", ""]
    assert TableTranslation({"a": "b"})(["x"]) == ["x"]
    assert "1 of 1 prompts stand nowhere in the table" in caplog.text
    for name, text, message in (
        ("b.tsv", "红灯笼 red", "line 1"),
        ("b.json", "[1]", "not one object"),
        ("c.json", "{", "is no JSON"),
        ("c.tsv", "", "holds no translations"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as error:
            read_translation(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_translation(tmp_path / "none.tsv")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="no translation model"):
        read_translation(tmp_path / "model")


def test_a_translation_models_folder_translates(tmp_path):
    from tiny_recipes import write_vocabulary
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(vocab_size=12, **sizes)).save_pretrained(tmp_path)
    write_vocabulary(tmp_path, ["红灯笼", "lamp"])
    translate = read_translation(tmp_path)
    one, nothing = translate(["红灯笼", ""])
    assert isinstance(one, str)
    assert nothing == ""
    assert translate(["红灯笼"]) == [one]


def test_an_unknown_judge_or_model_is_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        evaluate_routes(config(place, tmp_path / "out", base=str(tmp_path / "none")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="which the backbone knows"):
        config(place, tmp_path / "out", language="en")


@pytest.mark.parametrize("what", ["shuffled", "history"])
def test_a_missing_control_is_said_before_anything_is_drawn(place, tmp_path, what):
    given = config(place, tmp_path / "out")
    routes = {"text": given.routes["text"].model_copy(update={what: str(place / "none")})}
    with pytest.raises(UserError, match=f"routes.text.{what}=null"):
        evaluate_routes(given.model_copy(update={"routes": routes}))
    assert not (tmp_path / "out").exists()
