"""Bilingual pipelines.

Stock diffusers pipelines with the bridge on their UNet and four independent text inputs.
"""

# A mixin calls the methods of the stock pipeline it is mixed into, which the type checker cannot see.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any, SupportsIndex

import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..errors import UserError, quoted
from ..method.branch import BranchModel
from ..method.clock import check_window
from ..method.composed import ComposedGuidance
from ..method.condition import GUIDED, Part
from ..method.schedule import read_schedule
from ..plugins import Plugins
from ..plugins.kind import finite
from ..speed.approximate import EXACT, Approximation
from ..speed.bridge import Bridge
from ..speed.folding import fold_layers
from ..speed.optimize import Optimized
from ..speed.recognise import hooks_are_ours
from ..speed.sharing import Vouched
from ..text.native import NativeTextEncoder
from ..text.pairs import groups_of_one_length
from ..text.rules import A1111, PromptRules
from ..text.script import StagedFeatures, encode_stages
from .auto import register
from .beside import BesideMixin, Said, branches_of
from .exclusive import exclusively
from .groups import as_count, as_seed, draw_in_groups
from .inputs import check_inputs, stock_inputs, with_inputs_of
from .onlooker import Onlooker
from .parts import PartsMixin, Vae, check_parts
from .prompts import ChosenPrompts, read_prompts, step_count
from .text_slot import check_text_slot, check_width, joined_stages, refuse_branch_settings, says_something
from .texts import Texts, TextsMixin, adapters_scaled
from .world import settings_of


class BridgeMixin(TextsMixin, BesideMixin, PartsMixin):
    """What turns a stock Stable Diffusion pipeline into a bilingual one.

    Everything else is the stock pipeline's.
    """

    _optimized: Optimized | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" not in cls.__dict__:
            cls.__call__ = with_inputs_of(super(PartsMixin, cls).__call__, cls.__call__)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        negative_prompt: Texts | None = "",
        *,
        prompt_en: Texts | None = "",
        negative_prompt_en: Texts | None = "",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_en_embeds: Tensor | None = None,
        negative_prompt_en_embeds: Tensor | None = None,
        branch_scale: float = 1.0,
        branch_start: float = 0.0,
        branch_end: float = 1.0,
        branch_schedule: Any = None,
        world: float | None = None,
        english_guidance: float | None = None,
        beside: Mapping[str, Texts | Mapping[str, Any]] | None = None,
        num_images_per_prompt: SupportsIndex | None = 1,
        seed: SupportsIndex | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = 1,
        control_images: Any = None,
        plugin_strength: Mapping[str, float | tuple[float, float]] | None = None,
        share: bool = True,
        approximation: Approximation = EXACT,
        prompt_rules: PromptRules = A1111,
        **stock: Any,
    ) -> Any:
        """Draw pictures for native-language prompts.

        Args:
            prompt: P native prompts (a text is a list of one); read by the branch, or without one by the UNet
                in the place of English.
            negative_prompt: one native negative prompt, or P.
            prompt_en: English prompt of the backbone, or P of them. "" is what the branch was trained with;
                LoRA trigger words, embeddings and quality tags go here.
            negative_prompt_en: English negative prompt, or P.
            prompt_embeds: (P, L, D) native features instead of ``prompt``.
            negative_prompt_embeds: (P, L, D) native features instead of ``negative_prompt``.
            prompt_en_embeds: (P, M, E) English features instead of ``prompt_en``.
            negative_prompt_en_embeds: (P, M, E) English features instead of ``negative_prompt_en``.
            branch_scale: factor of the branch's residuals; 0 is the bare backbone.
            branch_start: the branch is off in step i of T where i/T < branch_start.
            branch_end: ... and where (i+1)/T > branch_end.
            branch_schedule: factors of ``branch_scale`` over the steps: text such as "0:0.2:0,0.2:1:1" (from,
                to, scale), numbers, or a function of the share of the steps (see
                ``bdm.method.schedule.read_schedule``).
            world: from 0, the world that the native prompt was learnt from, to 1, the English one, for things
                that the two see differently; instead of ``branch_schedule`` (see ``bdm.pipeline.world``).
            english_guidance: strength of the English prompt apart from the native one's, which is then
                ``guidance_scale`` alone; None guides by both together with ``guidance_scale``, as the paper
                does. It costs a third part of the batch where an English prompt says something (see
                ``bdm.method.composed``). What else positive prompts alone are given (an IP-Adapter's picture,
                a ControlNet that pools) then pulls with the English one.
            beside: what further branches are told (see ``add_branch``): by their names a prompt, or P of
                them, or a mapping of ``prompt``, ``negative_prompt``, ``scale``, ``start`` and ``end``.
            num_images_per_prompt: pictures for each prompt, P x n in all.
            seed: picture i uses seed + i, drawn on the CPU, so that it can be made again alone.
            generator: instead of ``seed``, as in diffusers.
            height: of the pictures in pixels, a multiple of 8; the model's own by default.
            width: likewise.
            clip_skip: layer of the English text encoder whose states are used, counted from the end as A1111
                does: 1 is the last.
            control_images: condition pictures of the attached ControlNets, by name; of a single one without
                its name.
            plugin_strength: strengths for this call only, by plug-in name; a pair gives UNet and text encoder
                apart.
            share: do once what both halves of a guided step would do twice (see ``bdm.speed.sharing``), with
                enlargements folded (see ``bdm.speed.folding``); False only compares.
            approximation: work to leave out although the picture changes (see ``bdm.Approximation``).
            prompt_rules: how prompts are read (see ``bdm.PromptRules``): by default A1111's grammar in both
                languages; the official inference's by ``bdm.PromptRules(emphasis="official",
                chunks="official")``.
            stock: whatever the stock pipeline takes: ``guidance_scale``, ``num_inference_steps``,
                ``latents``, ``output_type``, ``callback_on_step_end``, ``image``, ``strength``,
                ``mask_image`` ...

        Returns:
            The stock pipeline's output (``.images``).

        Raises:
            UserError: no prompt, counts or sizes that do not fit, an encoder that is needed and missing, an
                adapter that a prompt names and that is not attached.
        """
        check_inputs(stock, super().__call__, type(self))
        self._check_complete(stock, prompt_embeds is not None)
        if self.branch is None:
            refuse_branch_settings(
                branch_scale=(branch_scale, 1.0), branch_start=(branch_start, 0.0),
                branch_end=(branch_end, 1.0), english_guidance=(english_guidance, None),
                branch_schedule=(branch_schedule, None), world=(world, None),
                beside=(beside or None, None), approximation=(approximation, EXACT),
            )  # fmt: skip
        each = as_count(num_images_per_prompt)
        as_count(stock.get("num_inference_steps"), "num_inference_steps")
        if world is not None:
            branch_schedule, said = settings_of(world, branch_schedule)
            prompt_en, prompt_en_embeds = (prompt_en, prompt_en_embeds) if said else ("", None)
        native = self._native_pairs(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        english = self._english_pairs(
            prompt_en, negative_prompt_en, prompt_en_embeds, negative_prompt_en_embeds, len(native)
        )
        further = self._said_beside(beside, len(native), prompt_rules)
        self._check_sides(height, width)
        condition = {
            "scale": finite(branch_scale, "branch_scale"),
            "start": finite(branch_start, "branch_start"),
            "end": finite(branch_end, "branch_end"),
            "schedule": read_schedule(branch_schedule),
        }
        check_window(condition["start"], condition["end"], "branch")
        if seed is not None:
            if generator is not None:
                raise UserError("both seed and generator are given; give one of them")
            first, samples = as_seed(seed), len(native) * each
            generator = [torch.Generator().manual_seed(first + i) for i in range(samples)]
        size, latents = self._sizes(height, width, stock)
        inputs = stock | size | {"generator": generator, "num_images_per_prompt": each}
        ratio = self._english_ratio(english_guidance, inputs)

        steps = step_count(inputs, stock_inputs(super().__call__))
        prompts = read_prompts(
            native, english, steps, prompt_rules, self.plugins, self.text_encoder is not None,
            self._native_rules(prompt_rules),
        )  # fmt: skip

        def draw(chosen: list[int], inputs: dict[str, Any], pictures: Any) -> Any:
            ours = prompts.take(chosen)
            strengths, parts = ours.strengths(plugin_strength), ours.parts(self._parts)
            plugged = self.plugins.during_call(
                pictures, strengths, self._timesteps, each, latents, len(chosen) * each, parts
            )
            with plugged:
                return self._draw(
                    ours, prompt_rules, 1 if clip_skip is None else clip_skip,
                    condition, inputs, share, approximation, ratio, further, chosen,
                )  # fmt: skip

        groups = groups_of_one_length(
            [script.structure for script in prompts.scripts],
            [self._native_length(script, prompt_rules) for script in prompts.scripts],
            [self._english_length(script, prompt_rules) for script in prompts.scripts],
            *(said.lengths() for said in further),
        )
        return draw_in_groups(draw, groups, inputs, control_images)

    def _draw(
        self,
        prompts: ChosenPrompts,
        rules: PromptRules,
        clip_skip: int,
        settings: Mapping[str, Any],
        inputs: dict[str, Any],
        share: bool,
        approximation: Approximation,
        english_ratio: float | None,
        further: Sequence[Said],
        chosen: Sequence[int],
    ) -> Any:
        """Pictures for prompts whose texts are equally long, as the stock pipeline draws them."""
        guided = self._is_guided(inputs)
        control = getattr(self, "controlnet", None)
        prompts.check(guided, english_ratio, approximation, control)
        native = encode_stages(prompts.native, lambda pairs: self._native_features(pairs, guided, rules))
        images = inputs["num_images_per_prompt"]
        if self.branch is None and not says_something(prompts.english.pairs):
            return self._draw_by_text(prompts, native, inputs, share)
        # Adapters may change the English text encoder, so its texts are encoded with their strengths set.
        with adapters_scaled(self.text_encoder, inputs):
            english = encode_stages(
                prompts.english, lambda pairs: self._english_features(pairs, clip_skip, guided, rules)
            )
        if self.branch is None:
            return self._draw_by_text(prompts, joined_stages(native, english), inputs, share)
        ours, theirs = english.positive[0][0], english.negative[0]
        call: dict[str, Any] = dict(
            steps=self._timesteps, parts=prompts.parts(self._parts), images_per_prompt=images
        )
        condition = prompts.condition(native, **settings, **call)
        texts = prompts.step_texts(english, images, self._timesteps, prompts.english.one is not None)
        others = [said.condition(chosen, self, **call) for said in further]
        vouched, composed = self._vouch(inputs), None
        if english_ratio is not None and theirs is not None:
            # An English prompt that says what its negative says, and goes on to, makes no difference.
            silent = vouched.same_texts and texts is None and torch.equal(ours, theirs.to(ours))
            composed = None if silent else ComposedGuidance(english_ratio)
        bridge = Bridge(self.branch, share, approximation, vouched, composed, [*branches_of(further)])
        with ExitStack() as stack:
            stack.enter_context(exclusively(self.scheduler))
            stack.callback(bridge.detach)
            if texts is not None:
                texts.hang_before(stack, self.unet, control)
            bridge.attach(self.unet)
            stack.enter_context(bridge.condition(condition, *others))
            if texts is not None:
                texts.hang_after(stack, self.unet)
            if share and self.vae is not None:
                fold_layers(stack, self.vae)
            return super().__call__(prompt_embeds=ours, negative_prompt_embeds=theirs, **inputs)

    def _draw_by_text(
        self, prompts: ChosenPrompts, told: StagedFeatures, inputs: dict[str, Any], share: bool
    ) -> Any:
        """Pictures by features that the UNet itself reads, as the stock pipeline draws them."""
        control = getattr(self, "controlnet", None)
        one = prompts.native.one is not None and prompts.english.one is not None
        texts = prompts.step_texts(told, inputs["num_images_per_prompt"], self._timesteps, one)
        with ExitStack() as stack:
            stack.enter_context(exclusively(self.scheduler))
            if texts is not None:
                texts.hang_before(stack, self.unet, control)
                texts.hang_after(stack, self.unet)
            if share and self.vae is not None:
                fold_layers(stack, self.vae)
            positive, negative = told.positive[0][0], told.negative[0]
            check_width(self.unet, positive.shape[-1], "the native features")
            return super().__call__(prompt_embeds=positive, negative_prompt_embeds=negative, **inputs)

    def _check_complete(self, inputs: Mapping[str, Any], encoded: bool = False) -> None:
        """Refuse to draw without a part that is needed; a pipeline may be put together without it."""
        by_text = self.native_text_encoder is not None or encoded
        needed = ["unet", *([] if by_text else ["branch"]), "scheduler"]
        if inputs.get("output_type", "pil") != "latent":
            needed.append("vae")
        for name in needed:
            if getattr(self, name) is None:
                instead = ", or ask for output_type='latent'" if name == "vae" else ""
                raise UserError(f"the pipeline has no {name}, so it cannot draw; give it one{instead}")
        if self.branch is None:
            check_text_slot(self.unet, self.native_text_encoder)

    def _is_guided(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the stock pipeline is about to use guidance, and with it negative prompts."""
        return self._guidance_of(inputs) > 1

    def _guidance_of(self, inputs: Mapping[str, Any]) -> float:
        given = inputs.get("guidance_scale", stock_inputs(super().__call__)["guidance_scale"].default)
        return finite(given, "guidance_scale")

    def _english_ratio(self, english_guidance: float | None, inputs: Mapping[str, Any]) -> float | None:
        """How much stronger the English prompt pulls than the native one; None where they pull together."""
        if english_guidance is None:
            return None
        english_guidance = finite(english_guidance, "english_guidance")
        if not self._is_guided(inputs):
            raise UserError(
                f"english_guidance {english_guidance:g} weighs a difference that is only computed with"
                f" guidance, and guidance_scale is {self._guidance_of(inputs):g}; raise it above 1, or leave"
                " english_guidance out"
            )
        return english_guidance / self._guidance_of(inputs)

    def _timesteps(self) -> Tensor:
        """The timesteps of the call at hand, which may begin inside the scheduler's (image to image)."""
        return self.scheduler.timesteps[-self._num_timesteps :]

    def _parts(self) -> tuple[Part, ...]:
        return GUIDED if self.do_classifier_free_guidance else GUIDED[1:]

    def _vouch(self, inputs: Mapping[str, Any]) -> Vouched:
        """What is known of this call by construction (see ``bdm.speed.sharing.Vouched``)."""
        stock = type(self.scheduler).__module__.startswith("diffusers.schedulers.")
        callbacks = [
            name
            for name, value in inputs.items()
            if "callback" in name and callable(value) and type(value) is not Onlooker
        ]
        reached = inputs.get("callback_on_step_end_tensor_inputs") or ["latents"]
        networks = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        hooked = any(not hooks_are_ours(module) for network in networks for module in network.modules())
        return Vouched(
            same_latents=stock,
            same_texts=stock and not hooked and not (callbacks and any("embeds" in name for name in reached)),
            undisturbed=stock and not hooked and not callbacks,
        )

    def _check_sides(self, height: int | None, width: int | None) -> None:
        for name, side in (("height", height), ("width", width)):
            factor = max(8, self.vae_scale_factor)
            if side is not None and not isinstance(side, Real):
                raise UserError(f"{name} {quoted(side)} is no number; give a multiple of {factor}")
            if side is not None and (side <= 0 or side % factor):
                raise UserError(
                    f"{name} {side} is not a positive multiple of {factor}; use"
                    f" {max(factor, round(side / factor) * factor)}"
                )

    def _sizes(
        self, height: int | None, width: int | None, stock: Mapping[str, Any]
    ) -> tuple[dict[str, int], tuple[int, int] | None]:
        """What the stock pipeline is told of the pictures' size, and height and width of the latents where
        that tells them.
        """
        given, latents = height is not None or width is not None, stock.get("latents")
        if not given and (latents is not None or "image" in stock):  # they have a size of their own
            return {}, None
        sides = self.unet.config["sample_size"]
        rows, columns = (sides, sides) if isinstance(sides, int) else sides
        # diffusers takes its default for both where only one is given.
        size = {
            "height": height or rows * self.vae_scale_factor,
            "width": width or columns * self.vae_scale_factor,
        }
        known = (size["height"] // self.vae_scale_factor, size["width"] // self.vae_scale_factor)
        return size if given else {}, known if latents is None else None

    def optimize(self, *, height: int | None = None, width: int | None = None, count: int = 1) -> Optimized:
        """Prepare the networks, once for all calls to come, for the machine they are on.

        The pictures stay the same.

        On the CPU, weights are kept in the form that its kernels compute with (``bdm.speed.packing``).
        Whoever asks for a weight's values finds them whole, and its layer computes as before from then on.
        On a GPU, channels are put last and the repeated blocks are compiled. Called again, it starts afresh.

        Args:
            height: of the pictures to come in pixels, the model's own by default; other sizes work too.
            width: likewise.
            count: pictures at once.

        Returns:
            What was done and how long it took; ``.undo()`` takes it back.

        Raises:
            UserError: a size that is not a multiple of 8, no pictures, or no networks to prepare.
        """
        by_text = self.native_text_encoder is not None
        for part in ("unet", *([] if by_text else ["branch"]), "vae"):
            if getattr(self, part) is None:
                raise UserError(f"the pipeline has no {part}, which optimize() prepares; give it one")
        count = as_count(count, "count")
        self._check_sides(height, width)
        _, latents = self._sizes(height, width, {})
        assert latents is not None
        if self._optimized is not None:
            self._optimized.undo()
        self._optimized = Optimized()
        self._optimized.prepare(self, latents, count)
        return self._optimized

    @property
    def plugins(self) -> Plugins:
        """The plug-ins attached to the backbone: checkpoint, VAE, adapters, ControlNets, embeddings."""
        if "_plugins" not in self.__dict__:
            self._plugins = Plugins(self)
        return self._plugins


class BridgePipeline(BridgeMixin, StableDiffusionPipeline):
    """Text to picture, in two languages."""


class BridgeImg2ImgPipeline(BridgeMixin, StableDiffusionImg2ImgPipeline):
    """Picture to picture: ``image=`` and ``strength=`` as in diffusers."""


class BridgeInpaintPipeline(BridgeMixin, StableDiffusionInpaintPipeline):
    """Inpainting on an ordinary 4-channel backbone: ``image=`` and ``mask_image=`` as in diffusers."""


class BridgeControlNetPipeline(BridgeMixin, StableDiffusionControlNetPipeline):
    """A ControlNet on the backbone beside the branch.

    ``controlnet`` as a component, ``image=`` the condition.
    """

    # diffusers reads a pipeline's parts off its constructor, so it is written out here.
    def __init__(
        self,
        vae: Vae,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | list[ControlNetModel] | tuple[ControlNetModel] | MultiControlNetModel,
        scheduler: SchedulerMixin,
        branch: BranchModel | None,
        native_text_encoder: NativeTextEncoder | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        check_parts(unet, branch, native_text_encoder)
        stock: Any = super(PartsMixin, self)
        stock.__init__(
            vae, text_encoder, tokenizer, unet, controlnet, scheduler, safety_checker, feature_extractor,
            image_encoder, requires_safety_checker,
        )  # fmt: skip
        self.register_modules(branch=branch, native_text_encoder=native_text_encoder)


register(
    {
        "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {
            "bridge": BridgePipeline,
            "bridge-controlnet": BridgeControlNetPipeline,
        },
        "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {"bridge": BridgeImg2ImgPipeline},
        "AUTO_INPAINT_PIPELINES_MAPPING": {"bridge": BridgeInpaintPipeline},
    }
)
