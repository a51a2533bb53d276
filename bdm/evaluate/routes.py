"""``kind: routes``: every route to a native language on the same prompts with the same seeds, in one table.

Nothing is trained. Each route draws with the guidance that is best for it on other prompts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..config import RouteConfig, RoutesConfig
from ..drawing.grid import save_picture
from ..emoji.judge import JudgeModel
from ..emoji.words import Language
from ..emoji.world import EmojiSource, World
from ..errors import UserError
from ..files import check_writable
from ..models.samplers import make_scheduler
from ..shipped import find_path
from .guidance import SWEEP_SEED
from .plugin_effects import plugin_effects
from .route import Route, open_route
from .route_facts import as_it_was, kept_states, token_facts, training_facts, unet_facts
from .route_report import Sample, routes_picture, routes_report
from .setup import open_judges, refuse_other_size, write_result
from .shares import Share, flat_figures
from .trials import Trial, score, sweep_trials

#: Shares of the reference's accuracy whose samples are counted.
REACHED = (0.5, 0.9)
#: Captions whose tokens are counted, and pictures whose drawing is timed, so often.
CAPTIONS, TIMED, ROUNDS = 2000, 4, 3


def evaluate_routes(config: RoutesConfig) -> dict[str, Any]:
    """Draw and score all routes.

    Writes ``report.md``, ``result.json`` and ``routes.png`` into ``config.out``.

    Returns:
        The figures by route, as printed.

    Raises:
        UserError: a model that cannot be read, a judge of another world, or a folder that cannot be written.
    """
    torch.set_flush_denormal(True)
    if config.sampler:
        make_scheduler(config.sampler)  # an unknown name is refused before anything heavy
    check_writable(config.out)
    _refuse_missing_controls(config)
    world = World(config.world.concepts, config.world.seed)
    judges = open_judges(config.judge, config.second_judge, world)
    base = open_route(
        "backbone", RouteConfig(model=config.base, translate="none"), world, config.language, config.sampler
    )
    refuse_other_size(base.pipe, config.base, judges, {"": config.judge, "second_": config.second_judge})
    routes = [
        open_route(name, one, world, config.language, config.sampler) for name, one in config.routes.items()
    ]
    config.out.mkdir(parents=True, exist_ok=True)
    table = RouteTable(config, world, judges, base)
    rows = {route.name: table.row(route) for route in routes}
    table.time(routes, rows)
    table.learning(routes, rows)
    result: dict[str, Any] = {
        "routes": rows,
        "backbone": table.backbone,
        "chance": round(1 / len(world.concepts), 4),
    }
    samples = [table.sample(route) for route in routes]
    save_picture(routes_picture(samples), config.out / "routes.png")
    write_result(config.out, result, routes_report(config, result))
    return result


def _refuse_missing_controls(config: RoutesConfig) -> None:
    """See that what is opened late is there, before anything is drawn.

    Raises:
        UserError: names what is missing, and how it is left out.
    """
    for name, route in config.routes.items():
        for what, place in (("shuffled", route.shuffled), ("history", route.history)):
            if place is not None and not find_path(place).exists():
                raise UserError(
                    f"routes.{name}.{what}: {place} is not there; train it, or leave it out with"
                    f" routes.{name}.{what}=null"
                )


def route_trials(world: World, language: Language, controls: int, seed: int) -> dict[str, Trial]:
    """What every route is asked: all concepts, pairs never seen together, and "" (a control)."""
    every = [i for i, concept in enumerate(world.concepts) if language in concept.names]
    pairs = sorted(pair for pair in world.held_out if pair[0] in set(every))
    some = sorted(random.Random(seed).sample(every, min(controls, len(every))))

    def trial(name: str, title: str, texts: list[str], concepts: list[int], colours: Any = None) -> Trial:
        return Trial(name, title, texts, [""] * len(texts), concepts, colours)

    return {
        "all": trial("all", "all concepts", [world.caption(i, None, language) for i in every], every),
        "pairs": trial(
            "pairs", "pairs never seen together", [world.caption(i, c, language) for i, c in pairs],
            [i for i, _ in pairs], [c for _, c in pairs],
        ),
        "some": trial("some", "some concepts", [world.caption(i, None, language) for i in some], some),
        "empty": trial("empty", '""', [""] * len(some), some),
    }  # fmt: skip


def english_trial(world: World, controls: int, seed: int) -> Trial:
    """Everyday concepts in English, by which is told what the model still knows of it."""
    everyday = [i for i, concept in enumerate(world.concepts) if concept.group != "native"]
    some = sorted(random.Random(seed).sample(everyday, min(controls, len(everyday))))
    texts = [world.caption(i, None, "en") for i in some]
    return Trial("english", "English prompts", [""] * len(some), texts, some)


@dataclass
class RouteTable:
    """What the rows share: prompts, judges, the backbone that all began from.

    Args:
        config: the comparison.
        world: the concepts.
        judges: see ``Evaluation``.
        base: the backbone.
    """

    config: RoutesConfig
    world: World
    judges: Mapping[str, JudgeModel]
    base: Route

    def __post_init__(self) -> None:
        config = self.config
        self.trials = route_trials(self.world, config.language, config.controls, config.seed)
        self.asked = english_trial(self.world, config.controls, config.seed)
        self.guidance: dict[str, float] = {}
        source = EmojiSource(self.world, language=config.language, size=8)
        captions = list(dict.fromkeys(source.caption(i) for i in range(len(source))))
        self.captions = random.Random(config.seed).sample(captions, min(CAPTIONS, len(captions)))
        self.stock = self._english(self.base, config.guidances[0])
        #: The bare backbone with English prompts, the measure of what plug-ins do and of what is kept.
        self.backbone = flat_figures(self.stock)

    def row(self, route: Route) -> dict[str, Any]:
        """A route's figures."""
        guidance = self.guidance[route.name] = self.best_guidance(route)
        shares: dict[str, Share] = {}
        for prefix, found in self._judged(route, guidance).items():
            shares |= {prefix + name: share for name, share in found.items()}
        facts: dict[str, Any] = {"guidance": guidance, **unet_facts(route, self.base.pipe)}
        if route.pipe.text_encoder is None:
            facts["english_kept"] = None
        else:
            untouched = facts["unet_tensors_changed"] == 0
            shares |= self.stock if untouched else self._english(route, self.config.guidances[0])
        if (shuffled := self.config.routes[route.name].shuffled) is not None:
            shares["control_shuffled_top1"] = self._control(route, shuffled, guidance)
        if self.config.plugins is not None:
            effects, refused = plugin_effects(route, self.world, self.judges[""], self.config, guidance)
            shares |= effects
            facts["plugins_refused"] = refused
        facts |= training_facts(route) | token_facts(route, self.captions)
        return {**flat_figures(shares), **facts}

    def best_guidance(self, route: Route) -> float:
        """The guidance with the best mean of concepts and pairs, on prompts and seeds of their own."""
        config, found = self.config, {}
        if len(config.guidances) == 1:
            return config.guidances[0]
        trials = sweep_trials(self.world, config.controls, config.seed, config.language)
        for guidance in config.guidances:
            scores = [self._score(route, trial, guidance, SWEEP_SEED)[""] for trial in trials]
            found[guidance] = sum((s.both or s.concept).value for s in scores)
        return max(found, key=lambda guidance: found[guidance])

    def time(self, routes: Sequence[Route], rows: Mapping[str, dict[str, Any]]) -> None:
        """Add how many times a picture costs what one of the backbone's does; the routes take turns."""
        seconds: dict[str, list[float]] = {route.name: [] for route in (self.base, *routes)}
        for _ in range(ROUNDS):
            for route in (self.base, *routes):
                start = time.perf_counter()
                self._draw_some(route)
                seconds[route.name].append(time.perf_counter() - start)
        stock = median(seconds[self.base.name])
        for route in routes:
            rows[route.name]["picture_cost"] = round(median(seconds[route.name]) / stock, 3)

    def _draw_some(self, route: Route) -> None:
        """A few pictures: the backbone is told English, the routes are told their language."""
        some, guidance = self.trials["some"], self.config.guidances[0]
        if route is self.base:
            texts = self.asked.english[:TIMED]
            trial = replace(self.asked, native=[""] * len(texts), english=texts)
            route.draw_english(trial, self.config.steps, guidance, TIMED, 0)
        else:
            texts = some.native[:TIMED]
            trial = replace(some, name="cost", native=texts, english=[""] * len(texts))
            route.draw(trial, self.config.steps, guidance, TIMED, 0)

    def learning(self, routes: Sequence[Route], rows: Mapping[str, dict[str, Any]]) -> None:
        """Add after how many samples each had parts of the reference's accuracy; None where it never had."""
        goal = rows.get(self.config.reference, {}).get("top1")
        for route in routes:
            history = self.config.routes[route.name].history
            if goal is None or history is None:
                continue
            found: dict[float, int] = {}
            for samples, path in kept_states(history):
                with as_it_was(route, path):
                    scored = self._score(route, self.trials["some"], self.guidance[route.name])
                reached = scored[""].concept.value
                found |= {part: samples for part in REACHED if part not in found and reached >= part * goal}
            for part in REACHED:
                rows[route.name][f"samples_to_{round(part * 100)}"] = found.get(part)

    def sample(self, route: Route) -> Sample:
        """Pictures of a route for the common picture: native, seen differently, pairs, with each plug-in."""
        config, prompts = self.config, _shown(self.world, self.config.language)
        guidance = self.guidance[route.name]
        drawn = [route.draw(prompts, config.steps, guidance, config.batch, config.seed)]
        labels = [*prompts.native]
        if config.plugins is not None:
            from .plugin_effects import plugged_pictures

            for name, pictures in plugged_pictures(route, self.world, config, guidance, 1).items():
                labels.append(name)
                drawn.append(pictures if pictures is not None else torch.full_like(drawn[0][:1], 1.0))
        return Sample(route.title, labels, torch.cat(drawn))

    def _judged(self, route: Route, guidance: float) -> dict[str, dict[str, Share]]:
        """The shares of the native prompts, by judge."""
        scores = {
            name: self._score(route, trial, guidance) for name, trial in self.trials.items() if name != "some"
        }
        groups = [self.world.concepts[i].group for i in self.trials["all"].concepts]
        figures = {}
        for prefix in self.judges:
            every, pairs, empty = (scores[name][prefix] for name in ("all", "pairs", "empty"))

            def of(hits: Tensor, *wanted: str) -> Share:
                return Share.of(hits[torch.tensor([group in wanted for group in groups])])

            assert pairs.both is not None
            figures[prefix] = {
                "top1": every.concept,
                "native_top1": of(every.hits, "native"),
                "everyday_top1": of(every.hits, "different", "shared"),
                "held_out_pairs": pairs.both,
                "native_look": of(every.looks, "different"),
                "control_empty_top1": empty.concept,
            }
        return figures

    def _english(self, route: Route, guidance: float) -> dict[str, Share]:
        config = self.config
        pictures = route.draw_english(self.asked, config.steps, guidance, config.batch, config.seed)
        return {"english_kept": score(self.judges[""], pictures, self.asked).concept}

    def _control(self, route: Route, model: str, guidance: float) -> Share:
        """The same route trained on shuffled captions."""
        config = self.config
        settings = config.routes[route.name]
        settings = settings.model_copy(update={"branch" if settings.branch else "model": model})
        other = open_route(f"{route.name}, shuffled", settings, self.world, config.language, config.sampler)
        if other.slot != route.slot:
            raise UserError(
                f"routes.{route.name}.shuffled: {model} is another route's; give the same route's control"
            )
        return self._score(other, self.trials["some"], guidance)[""].concept

    def _score(self, route: Route, trial: Trial, guidance: float, seed: int = 0) -> dict[str, Any]:
        config = self.config
        pictures = route.draw(trial, config.steps, guidance, config.batch, config.seed + seed)
        return {prefix: score(judge, pictures, trial) for prefix, judge in self.judges.items()}


def _shown(world: World, language: Language, each: int = 2) -> Trial:
    """Some prompts of each kind: native things, things seen differently, pairs never seen together."""
    asked: list[tuple[int, str | None]] = []
    for group in ("native", "different"):
        of_group = [i for i, c in enumerate(world.concepts) if c.group == group and language in c.names]
        asked += [(i, None) for i in of_group[:each]]
    asked += sorted(pair for pair in world.held_out if language in world.concepts[pair[0]].names)[:each]
    texts = [world.caption(i, colour, language) for i, colour in asked]
    return Trial("shown", "", texts, [""] * len(texts), [i for i, _ in asked])
