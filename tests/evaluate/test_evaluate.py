import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from bdm.config import EvaluateConfig, ModeConfig
from bdm.emoji.judge import JudgeModel, Verdict, augment, augment_crops
from bdm.emoji.phrases import read_phrases
from bdm.emoji.world import COLOUR_NAMES, World
from bdm.errors import UserError
from bdm.evaluate import ablation, demo, guidance, languages, modes, report, setup, world_slider
from bdm.evaluate.combinations import NAMES, Combined, combination_trial, edge_agreement, ratios
from bdm.evaluate.plugins import evaluate_combinations
from bdm.evaluate.shares import Share
from bdm.evaluate.trials import draw, make_trials, score, sweep_mixed, sweep_trials
from bdm.files import check_writable


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


@pytest.mark.parametrize("augment", [augment, augment_crops])
def test_augmentation_belongs_to_the_picture_and_keeps_a_plain_background(augment):
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    whole = augment(pictures, generators(3))
    torch.testing.assert_close(augment(pictures[1:2], generators(3)[1:2]), whole[1:2])
    assert (whole - pictures).abs().mean() > 0.02
    plain = torch.full((1, 3, 32, 32), 0.5)
    changed = augment(plain, generators(1))
    assert (changed - changed.mean()).abs().mean() < 0.15, "only noise on a plain picture"


@pytest.mark.parametrize("architecture", ["convolutional", "transformer"])
def test_judge_saves_and_loads(tmp_path, architecture):
    treatments = ("plain", "outlined", "sealed")
    judge = JudgeModel(5, 8, 32, 32, treatments, architecture).eval()
    judge.save_pretrained(tmp_path)
    pictures = torch.rand(2, 3, 32, 32)
    loaded = JudgeModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pictures).concept, judge(pictures).concept, atol=2e-3, rtol=1e-2)
    assert loaded(torch.rand(2, 3, 64, 64)).colour.shape == (2, 8)
    assert loaded(pictures).treatment.shape == (2, 3)
    assert loaded.config["treatments"] == ["plain", "outlined", "sealed"]


class FixedJudge:
    """A judge that says what it is told."""

    def __init__(self, concepts, colours, looks):
        sizes = (640, len(COLOUR_NAMES), 2, 2)
        said = (concepts, colours, looks, [0] * len(looks))
        self.verdict = Verdict(
            *(torch.nn.functional.one_hot(torch.tensor(v), n).float() for v, n in zip(said, sizes))
        )

    def __call__(self, pictures):
        return self.verdict


def test_trials_cover_the_world_and_scores_are_shares():
    world = World()
    trials = {t.name: t for t in make_trials(world, controls=8, seed=0)}
    assert trials["chinese"].concepts == list(range(640))
    assert set(zip(trials["held_out"].concepts, trials["held_out"].colours)) == world.held_out
    seen = set(zip(trials["trained_pairs"].concepts, trials["trained_pairs"].colours))
    alone, sweep = sweep_trials(world, 64, seed=0)
    assert len(set(alone.concepts)) == 64
    assert alone.native == [world.caption(i, None, "zh") for i in alone.concepts]
    assert not (seen | set(zip(sweep.concepts, sweep.colours))) & world.held_out
    assert sorted(trials["trained_pairs"].concepts) == sorted(trials["held_out"].concepts)
    assert len(sweep.native) == 64
    assert all(world.concepts[i].group != "native" for i in trials["english"].concepts)
    assert not any(trials["english"].native)
    assert not any(trials["chinese"].english)
    assert trials["scale_0"].branch_scale == 0
    trial = trials["mixed"]
    right = [COLOUR_NAMES.index(c) for c in trial.colours]
    wrong_colour = [*right[:6], *((c + 1) % 8 for c in right[6:])]
    concepts = [*trial.concepts[:4], *((i + 1) % 640 for i in trial.concepts[4:])]
    result = score(FixedJudge(concepts, wrong_colour, [1] * 2 + [0] * 6), torch.zeros(8, 3, 32, 32), trial)
    shares = (result.concept, result.colour, result.both, result.openmoji)
    assert [share.value for share in shares] == [0.5, 0.75, 0.5, 0.25]
    assert result.concept.error == pytest.approx((0.5 * 0.5 / 8) ** 0.5)
    assert result.looks.tolist() == [True] * 2 + [False] * 6


def test_mixed_prompts_name_the_background_alone_and_may_be_composed():
    world = World()
    plain = {t.name: t for t in make_trials(world, controls=8, seed=0)}
    composed = {t.name: t for t in make_trials(world, controls=8, seed=0, english_guidance=1.5)}
    assert set(composed) - set(plain) == {"mixed_composed"}
    assert composed["mixed_composed"].english_guidance == 1.5
    assert composed["mixed_composed"].english == plain["mixed"].english == plain["background"].english
    words = [f"{colour} background" for colour in plain["mixed"].colours]
    assert plain["mixed"].english == words
    assert not any(plain["background"].native)


def test_ratios_compare_what_each_plugin_adds():
    """Each plug-in adds 0.4 in English, 0.3 beside the branch, 0.2 to the three others.

    Each costs a tenth of the content.
    """
    rows, english = {}, {}
    for on in product((False, True), repeat=4):
        adds = 0.2 if all(on) else 0.3
        rows[on] = {"content": 0.8 * 0.9 ** sum(on)} | {
            name: 0.1 * sum(on) + adds * own for name, own in zip(NAMES, on)
        }
        english[on] = {"content": 0.7} | {name: 0.05 + 0.4 * own for name, own in zip(NAMES, on)}
    rows[True, False, False, False]["content"] = 0.4
    rows, english = (
        {on: {name: Share(value, 64) for name, value in figures.items()} for on, figures in each.items()}
        for each in (rows, english)
    )
    result = ratios(rows, english)
    assert result["single_content_ratio"] == 0.5
    assert result["single_effect_ratio"] == pytest.approx((0.3 + 0.1) / 0.4)
    assert result["all_content_ratio"] == pytest.approx(0.8 * 0.9**4 / 0.7, abs=1e-4)
    assert result["all_content"] == pytest.approx(0.8 * 0.9**4, abs=1e-4)
    # In the last row 0.1 more than in one of three, which all have the same figure of their own kind.
    assert result["all_effect_ratio"] == pytest.approx((0.2 + 0.1) / 0.4)


def test_edges_agree_where_they_are_at_the_same_place():
    drawn, given = (np.zeros((4, 4), np.uint8) for _ in range(2))
    drawn[0, :2], given[0, 1:] = 255, 255
    # One pixel of two drawn and of three given: precision 1/2, recall 1/3.
    assert edge_agreement(Image.fromarray(drawn), Image.fromarray(given)) == pytest.approx(0.4)
    assert edge_agreement(Image.fromarray(drawn), Image.fromarray(drawn)) == 1
    assert edge_agreement(*[Image.fromarray(np.zeros((4, 4), np.uint8))] * 2) == 0


def test_a_folder_of_something_else_is_no_judges(tmp_path):
    JudgeModel(concepts=5, colours=8, width=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (
        {"_class_name": "BranchModel"},
        config | {"more": 1},
        config | {"width": "8"},
        config | {"treatments": ["ink"]},
        config | {"architecture": "other"},
        {name: value for name, value in config.items() if name != "architecture"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="is not a judge's folder"):
            JudgeModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 16}))
    with pytest.raises(UserError, match="has shape"):
        JudgeModel.from_pretrained(tmp_path)


def test_draw_gives_every_prompt_its_seed(pipe):
    world = World()
    trial = make_trials(world, controls=3, seed=0)[-1]
    whole = draw(pipe, trial, steps=2, guidance=2.0, batch=3, seed=5)
    parts = draw(pipe, trial, steps=2, guidance=2.0, batch=2, seed=5)
    assert whole.shape == (3, 3, 64, 64)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)


#: The smallest world; whether an evaluation's figures are right does not depend on its size.
CONCEPTS = 148


class KnowingJudge:
    """Told what each trial asked for, it finds every third picture's concept right, every second one's colour
    and look.
    """

    augment = staticmethod(augment)

    def __init__(self):
        self.config = {
            "concepts": CONCEPTS,
            "colours": len(COLOUR_NAMES),
            "width": 8,
            "size": 64,
            "treatments": ["plain", "grey"],
        }
        self.trial = None

    def __call__(self, pictures):
        numbers = torch.arange(len(pictures))
        concepts, colours = torch.zeros_like(numbers), torch.zeros_like(numbers)
        if self.trial is not None and len(self.trial.concepts) == len(pictures):
            concepts = (torch.tensor(self.trial.concepts) + (numbers % 3 > 0)) % CONCEPTS
            if self.trial.colours:
                colours = (
                    torch.tensor([COLOUR_NAMES.index(c) for c in self.trial.colours]) + numbers % 2
                ) % 8
        said = ((concepts, CONCEPTS), (colours, 8), (numbers % 2, 2), (torch.zeros_like(numbers), 2))
        return Verdict(*(torch.nn.functional.one_hot(classes, n).float() for classes, n in said))


@pytest.fixture
def knowing(pipe, tmp_path, monkeypatch):
    """A tiny model's folder, and a judge that knows which trial is drawn."""
    judge = KnowingJudge()

    def noted(pipe, trial, *arguments, **named):
        judge.trial = trial
        return draw(pipe, trial, *arguments, **named)

    monkeypatch.setattr(report, "JUDGED", 16)
    monkeypatch.setattr(report, "draw", noted)
    monkeypatch.setattr(guidance, "draw", noted)
    monkeypatch.setattr(modes, "draw", noted)
    monkeypatch.setattr(languages, "draw", noted)
    monkeypatch.setattr(setup.JudgeModel, "from_pretrained", lambda _: judge)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path


def evaluation(folder, **changes):
    settings = dict(
        model=str(folder / "model"), judge="stub", out=folder / "out", steps=1, batch=64, controls=6
    )
    return EvaluateConfig(
        **settings | dict(world=dict(concepts=CONCEPTS), guidance_sweep=(1.0, 2.0)) | changes
    )


def thirds(count):
    return len(range(0, count, 3)) / count


def test_an_evaluation_writes_what_the_judge_said(knowing, capsys):
    figures = report.evaluate(evaluation(knowing, shuffled_branch=str(knowing / "model/branch")))
    world = World(CONCEPTS)
    pairs, native = len(world.held_out), [i for i, c in enumerate(world.concepts) if c.group == "native"]
    different = [i for i, c in enumerate(world.concepts) if c.group == "different"]
    sixths = len(range(0, pairs, 6)) / pairs
    expected = {
        "chinese_top1": thirds(CONCEPTS),
        "native_top1": thirds(len(native)),
        "native_look": (len(different) // 2) / len(different),
        "held_out_pairs": sixths,
        "trained_pairs": sixths,
        "control_scale_0_top1": thirds(6),
        "control_shuffled_top1": thirds(6),
        "control_empty_top1": thirds(6),
        "mixed_concept": thirds(6),
        "mixed_colour": 1 / 2,
        "mixed_both": 1 / 6,
        "chance": 1 / CONCEPTS,
        "guidance_1_concepts": 1 / 3,
        "guidance_1_pairs": 1 / 6,
        "english_top1": thirds(CONCEPTS - len(native)),
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert json.loads((knowing / "out/result.json").read_text()) == figures
    text = (knowing / "out/report.md").read_text()
    assert f"chinese_top1 {figures['chinese_top1']:.3f} (reach 0.93)" in text
    chinese = f"{figures['chinese_top1']:.3f} ± {figures['chinese_top1_se']:.3f}"
    assert f"| Chinese prompts, all concepts | {CONCEPTS} | {chinese} |  |  | 0.500 ± 0.041 |" in text
    assert "| 2 | 0." in text, "the sweep"
    pictures = {path.stem for path in (knowing / "out").glob("*.png")}
    assert pictures == {trial.name for trial in make_trials(world, 6, 0)}
    assert all(f"({name}.png)" in text for name in pictures)


def test_a_second_judge_says_the_same_of_the_same_pictures(knowing):
    figures = report.evaluate(
        evaluation(knowing, second_judge="stub", guidance_sweep=(), english_guidance=1.0)
    )
    seconds = {name for name in figures if name.startswith("second_")}
    assert {"second_chinese_top1", "second_mixed_both_se", "second_composed_both"} <= seconds
    assert all(
        figures[name] == figures[name.removeprefix("second_")] for name in seconds if "judge" not in name
    )
    text = (knowing / "out/report.md").read_text()
    assert f"± {figures['native_look_se']:.3f}" not in text.splitlines()[0]
    assert " (0.500)" in text, "in brackets"


@pytest.mark.parametrize("plugins", [False, True])
def test_a_judge_of_another_world_is_refused_by_both_evaluations(knowing, plugins):
    names = ("checkpoint", "lora", "controlnet", "embedding", "lora_trigger")
    files = dict.fromkeys(names, "x") | {"embedding_colour": "red"}
    config = evaluation(knowing, world=dict(concepts=CONCEPTS + 1), plugins=files)
    with pytest.raises(
        UserError, match=f"knows {CONCEPTS} concepts in 8 colours and the world has {CONCEPTS + 1} in 8"
    ):
        evaluate_combinations(config, config.plugins) if plugins else report.evaluate(config)
    assert not (knowing / "out").exists()


def test_a_judge_that_cannot_see_the_plugins_is_refused(knowing):
    files = dict.fromkeys(("checkpoint", "lora", "controlnet", "embedding", "lora_trigger"), "x") | {
        "embedding_colour": "red"
    }
    config = evaluation(knowing, plugins=files)
    with pytest.raises(UserError, match=r"tells apart plain, grey; .*configs/emoji_64/judge\.yaml"):
        evaluate_combinations(config, config.plugins)


def test_modes_are_scored_and_timed_beside_the_exact_one(knowing, monkeypatch, capsys):
    monkeypatch.setattr(modes, "ROUNDS", 2)
    chosen = {
        "fewer": dict(steps=1),
        "half": dict(guidance_interval=(0, 0.5), sampler="lcm"),
        "deep": dict(deep_every=2),
    }
    config = evaluation(knowing, steps=2, modes=chosen)
    rows = modes.evaluate_modes(config, config.modes)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["modes"] == rows
    assert list(rows) == ["exact", *chosen]
    assert all(row["chinese_top1"] == pytest.approx(thirds(CONCEPTS), abs=1e-4) for row in rows.values())
    assert rows["exact"]["speedups"] == [1.0, 1.0]
    assert rows["fewer"]["speedup"] > 1.2, "one step for two"
    text = (knowing / "out/report.md").read_text()
    assert "| fewer | 1 | 4 |" in text
    assert "| deep | 2 | 4 |" in text
    assert (knowing / "out/grid.png").is_file()


def test_a_mode_is_undone_and_what_it_cannot_load_is_said_first(knowing, pipe):
    scheduler = pipe.scheduler
    with modes.in_mode(pipe, ModeConfig(steps=1, guidance=1.0, sampler="lcm")):
        assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert pipe.scheduler is scheduler
    config = evaluation(knowing, modes={"none": dict(lora=str(knowing / "none.safetensors"))})
    with pytest.raises(UserError, match="none.safetensors"):
        modes.evaluate_modes(config, config.modes)
    assert not list((knowing / "out").glob("*"))


def test_languages_are_scored_each_for_itself_and_together(knowing, capsys):
    said = dict(trained=("zh", "ja"), never=("de",), phrases=("zh",))
    branch = str(knowing / "model/branch")
    config = evaluation(knowing, languages=said, branch=branch, shuffled_branch=branch, controls=7)
    figures = languages.evaluate_languages(config, config.languages)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    world = World(CONCEPTS)
    native = sum(concept.group == "native" for concept in world.concepts)
    phrases = len(read_phrases(world, ("zh",)))
    assert figures["names_de"] == figures["never_trained_languages"] == pytest.approx(thirds(7), abs=1e-4)
    assert figures["native_ja"] == pytest.approx(thirds(native), abs=1e-4)
    assert figures["phrases"] == pytest.approx(thirds(phrases), abs=1e-4)
    assert figures["trained_languages_se"] == pytest.approx((3 / 7 * 4 / 7 / 14) ** 0.5, abs=1e-4)
    assert figures["shuffled_names_zh"] == pytest.approx(thirds(7), abs=1e-4)
    assert not any(name.startswith("shuffled_names_ja") for name in figures)
    text = (knowing / "out/report.md").read_text()
    assert "| Names, de (never trained) | 7 | 0.429 ± 0.187 |" in text
    assert "Control, shuffled captions: Names, zh (trained)" in text
    drawn = {path.stem for path in (knowing / "out").glob("*.png")}
    assert drawn == {f"{kind}_{one}" for kind in ("names", "native") for one in ("zh", "ja", "de")} | {
        "phrases_zh"
    }


def test_reach_is_named():
    assert (
        setup.below_reach({"a": 0.5, "b": 0.9}, {"a": 0.6, "b": 0.9}) == "Below reach: a 0.500 (reach 0.60)."
    )
    assert setup.below_reach({"a": 0.7}, {"a": 0.6}) == "Below reach: nothing."


def test_trigger_words_stand_in_the_english_prompt():
    world = World(CONCEPTS)
    config = evaluation_plugins()
    native = combination_trial(world, [3, 5], config, ["lora", "controlnet", "embedding"], native=True)
    english = combination_trial(world, [3, 5], config, ["lora", "controlnet", "embedding"], native=False)
    assert native.native == [world.caption(i, None, "zh") for i in (3, 5)]
    assert native.english == ["ink, dusk"] * 2
    assert english.english == [f"{world.caption(i, None, 'en')}, ink, dusk" for i in (3, 5)]
    assert (english.native, english.branch_scale, native.branch_scale) == (["", ""], 0.0, 1.0)


def evaluation_plugins():
    from bdm.config import PluginFilesConfig

    return PluginFilesConfig(
        checkpoint="a",
        lora="b",
        controlnet="c",
        embedding="folder/dusk.pt",
        lora_trigger="ink",
        embedding_colour="red",
    )


def test_a_folder_that_cannot_be_made_is_refused_and_none_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a/b/c")
    check_writable(tmp_path)
    assert not (tmp_path / "a").exists()
    for wrong in ("file", "file/a/b"):
        with pytest.raises(UserError, match="file is a file; choose another with out="):
            check_writable(tmp_path / wrong)


def test_what_is_chosen_is_chosen_elsewhere_and_used(knowing, monkeypatch):
    tried = []

    def scored(judge, pictures, trial):
        tried.append(trial)
        found = score(judge, pictures, trial)
        return replace(found, concept=Share(float(len(tried) in (3, 4)), 6), both=None)

    monkeypatch.setattr(guidance, "score", scored)
    config = evaluation(knowing, choose=True, guidance_sweep=(1.5, 3.0, 4.0), controls=6)
    opened = setup.open_evaluation(config)
    reported = make_trials(opened.world, 6, 0)
    chosen, sweeps = guidance.choose(opened, config, reported)
    assert (chosen.guidance, sweeps.best_guidance) == (3.0, 3.0)
    asked = {prompt for trial in reported for prompt in trial.prompts}
    assert not [prompt for trial in tried if trial.colours for prompt in trial.prompts if prompt in asked]
    plain = config.model_copy(update={"choose": False})
    assert guidance.choose(opened, plain, reported)[0].guidance == 4.0
    with pytest.raises(ValueError, match="name values to try"):
        evaluation(knowing, choose=True, guidance_sweep=())
    with pytest.raises(ValueError, match="may be 1: try values above 1"):
        evaluation(knowing, choose=True, guidance_sweep=(1.0, 2.0), english_guidance_sweep=(1.0,))


def test_rows_have_as_many_prompts_as_are_wanted_and_no_more():
    world = World()
    trials = {t.name: t for t in make_trials(world, controls=128, seed=0, pictures=200)}
    assert all(len(trial.native) >= 128 for trial in trials.values())
    assert max(len(trial.native) for trial in trials.values()) == 200
    assert {world.concepts[i].group for i in trials["native"].concepts} == {"native"}
    assert trials["native"].native[:70] == trials["native"].native[70:], "again, with other seeds"
    reported = {prompt for trial in trials.values() for prompt in trial.prompts}
    mixed = sweep_mixed(world, 64, 0, reported)
    assert not reported & {*mixed.prompts}
    for sweep in sweep_trials(world, 64, 0, "zh", reported):
        assert len(sweep.native) == 64
        assert not reported & {*sweep.prompts}
    assert all(f"{colour} background" == text for colour, text in zip(mixed.colours, mixed.english))


def plugin_files(files):
    return dict(
        checkpoint=str(files["style"]), lora=str(files["ink"]), controlnet=str(files["edges"]),
        embedding=str(files["mood"]), lora_trigger="ink", embedding_colour="red", pairs=False,
    )  # fmt: skip


def know_plugins():
    """Let the judge tell apart what plug-ins draw."""
    known = ["plain", "outlined", "sealed", "outlined_sealed"]
    setup.JudgeModel.from_pretrained(None).config["treatments"] = known


def test_plugins_are_compared_with_the_bare_backbone(knowing, files):
    know_plugins()
    config = evaluation(knowing, plugins=plugin_files(files), second_judge="stub", choose=True, controls=2)
    result = evaluate_combinations(config, config.plugins)
    assert len(result["rows"]) == len(result["second_english"]) == 10
    assert result["guidance"] in config.guidance_sweep
    assert {"all_content", "second_single_effect_ratio"} <= result.keys()
    assert (knowing / "out/grid.png").exists()


def test_branches_are_compared_on_one_backbone(knowing, files, monkeypatch):
    monkeypatch.setattr(ablation, "draw", report.draw)
    monkeypatch.setattr(ablation, "make_trials", lambda *given: [cut(one) for one in make_trials(*given)])
    branch = str(knowing / "model/branch")
    rows = dict(
        plain=dict(branch=branch), apart=dict(title="composed", branch=branch, composed=True)
    )  # fmt: skip
    config = evaluation(
        knowing, ablation=rows, guidance_sweep=(), guidance=2.0, english_guidance=1.5, controls=2,
        second_judge="stub", plugins=plugin_files(files),
    )  # fmt: skip
    know_plugins()
    result = ablation.evaluate_ablation(config, config.ablation)
    assert result["rows"].keys() == {"plain", "apart"}
    plain, apart = result["rows"].values()
    assert (plain["english_guidance"], apart["english_guidance"]) == (None, 1.5)
    assert plain["mixed_both"] == plain["second_mixed_both"] == 0.5
    text = (knowing / "out/report.md").read_text()
    assert "| composed | 2.000 | 1.500 |" in text
    assert {"all_content_ratio", "second_all_effect_ratio"} <= apart.keys()
    assert len(result["english"]) == 2 * 10
    assert (knowing / "out/grid.png").exists()
    with pytest.raises(ValueError, match="says how strongly"):
        evaluation(knowing, ablation=rows)


def test_the_world_slider_has_a_curve(knowing, monkeypatch):
    drawn = []

    def noted(pipe, trial, *arguments, **named):
        drawn.append((trial, named["world"]))
        return report.draw(pipe, trial, *arguments, **named)

    monkeypatch.setattr(world_slider, "draw", noted)
    monkeypatch.setattr(world_slider, "make_trials", lambda *given: [cut(one) for one in make_trials(*given)])
    config = evaluation(knowing, slider=(0.0, 0.5), second_judge="stub", guidance_sweep=(), guidance=2.0)
    result = world_slider.evaluate_slider(config, config.slider)
    assert [world for _, world in drawn] == [0.0, 0.5, None]
    native, between, bare = (trial for trial, _ in drawn)
    assert native.native == between.native
    assert native.english == between.english == bare.english
    assert bare.native == [""] * 2
    assert bare.branch_scale == 0
    world = World(CONCEPTS)
    assert {world.concepts[i].group for i in native.concepts} == {"different"}
    assert native.english == [world.caption(i, None, "en") for i in native.concepts]
    assert result["rows"].keys() == {"0", "0.5", "english"}
    assert {row["concept"] for row in result["rows"].values()} == {0.5}
    assert {row["second_native_look"] for row in result["rows"].values()} == {0.5}
    assert "| 0.5 | 0.500 ± 0.354 (0.500) |" in (knowing / "out/report.md").read_text()
    for name in ("curve.png", "grid.png"):
        with Image.open(knowing / "out" / name) as picture:
            assert picture.width > 200


def cut(trial):
    parts = {name: getattr(trial, name)[:2] for name in ("native", "english", "concepts")}
    return replace(trial, colours=trial.colours and trial.colours[:2], **parts)


def test_no_ratio_needs_two_plugins_alone():
    files = evaluation_plugins()
    every = Combined(None, files, [], []).combinations()
    needed = Combined(None, files.model_copy(update={"pairs": False}), [], []).combinations()
    assert (len(every), len(needed)) == (16, 10)
    figures = {on: {name: Share(0.5, 8) for name in ("content", *NAMES)} for on in needed}
    assert ratios(figures, figures)["single_content_ratio"] == 1.0


def test_a_judge_of_pictures_of_another_size_is_refused(knowing):
    opened = setup.open_evaluation(evaluation(knowing))
    opened.judge.config["size"] = 32
    with pytest.raises(UserError, match=r"draws pictures of 64x64 pixels and the judge in stub knows"):
        setup.open_evaluation(evaluation(knowing))


def test_the_demo_has_a_row_for_each_promise(knowing, files):
    know_plugins()
    figures = demo.draw_demo(evaluation(knowing, demo=1, plugins=plugin_files(files), guidance=2.0), 1)
    rows = ["native", "seen here", "seen there", "two languages", *NAMES, "all together"]
    assert [name for name in figures if not name.endswith("_se")] == rows
    with Image.open(knowing / "out/grid.png") as grid:
        assert grid.height > len(rows) * 128
    report = (knowing / "out/report.md").read_text()
    assert all(f"| {name} |" in report for name in rows)


def test_the_demo_asks_for_what_people_know():
    world = World()
    native, here, there, both = demo.demo_trials(world, 6)
    assert native.native[0] == "红灯笼"
    assert {world.concepts[i].group for i in native.concepts} == {"native"}
    assert here.concepts == there.concepts
    assert (there.branch_scale, here.branch_scale) == (0, 1.0)
    assert {world.concepts[i].group for i in here.concepts} == {"different"}
    assert all(text.endswith(" background") for text in both.english)
    assert all(len(trial.native) == 6 for trial in (native, here, there, both))
