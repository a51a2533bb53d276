"""Bilingual pipelines.

Stock diffusers pipelines with the bridge on their UNet and four independent text inputs.
"""

# A mixin calls the methods of the stock pipeline it is mixed into, which the type checker cannot see.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from .errors import UserError
from .formats.weights import resolve_folder
from .method.branch import BranchModel
from .method.bridge import Bridge, NativeCondition, check_window
from .models.backbone import empty_prompt_features, load_backbone
from .plugins import Plugins
from .speed.approximate import EXACT, Approximation
from .speed.folding import prepared_layers
from .speed.optimize import Execution
from .text.english import encode_english
from .text.native import NativeTextEncoder

Texts = str | Sequence[str]


class BridgeMixin:
    """What turns a stock Stable Diffusion pipeline into a bilingual one.

    Everything else is the stock pipeline's.
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    branch: BranchModel
    native_text_encoder: NativeTextEncoder | None

    #: (1, 77, D) features of the English prompt "", for pipelines without an English text encoder.
    empty_english: Tensor | None = None

    _execution: Execution | None = None

    #: The branch is none of the sequence: it comes with the UNet's first step and stays to the end of the
    #: call.
    model_cpu_offload_seq = "native_text_encoder->text_encoder->image_encoder->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        branch: BranchModel,
        native_text_encoder: NativeTextEncoder | None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        self._check_parts(unet, branch, native_text_encoder)
        super().__init__(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )  # fmt: skip
        self.register_modules(branch=branch, native_text_encoder=native_text_encoder)

    @staticmethod
    def _check_parts(unet: Any, branch: BranchModel, native_text_encoder: NativeTextEncoder | None) -> None:
        width = branch.config["cross_attention_dim"]
        if native_text_encoder is not None and native_text_encoder.text_dim != width:
            raise UserError(
                f"the native text encoder's features are {native_text_encoder.text_dim} wide and the branch"
                f" reads {width}; use the text encoder that the branch was trained with"
            )
        Bridge(branch).check(unet)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        negative_prompt: Texts = "",
        *,
        prompt_en: Texts = "",
        negative_prompt_en: Texts = "",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_en_embeds: Tensor | None = None,
        negative_prompt_en_embeds: Tensor | None = None,
        branch_scale: float = 1.0,
        branch_start: float = 0.0,
        branch_end: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int = 1,
        control_images: Any = None,
        plugin_strength: Mapping[str, float | tuple[float, float]] | None = None,
        share: bool = True,
        approximation: Approximation = EXACT,
        **stock: Any,
    ) -> Any:
        """Draw pictures for native-language prompts.

        Args:
            prompt: P native prompts (a text is a list of one); read by the branch.
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
                enlargements folded (see ``bdm.speed.folding``) and weights packed (see
                ``bdm.speed.packing``); False only compares.
            approximation: work to leave out although the picture changes (see ``bdm.Approximation``).
            stock: whatever the stock pipeline takes: ``guidance_scale``, ``num_inference_steps``,
                ``latents``, ``output_type``, ``callback_on_step_end``, ``image``, ``strength``,
                ``mask_image`` ...

        Returns:
            The stock pipeline's output (``.images``).

        Raises:
            UserError: no prompt, counts or sizes that do not fit, an encoder that is needed and missing.
        """
        positive, negative = self._native_features(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        count = len(positive)
        self._check_sides(height, width)
        check_window(branch_start, branch_end, "branch")
        if seed is not None:
            if generator is not None:
                raise UserError("both seed and generator are given; give one of them")
            generator = [
                torch.Generator().manual_seed(seed + i) for i in range(count * num_images_per_prompt)
            ]
        condition = NativeCondition(
            positive, negative, branch_scale, branch_start, branch_end,
            steps=lambda: self._num_timesteps, images_per_prompt=num_images_per_prompt,
            approximation=approximation,
        )  # fmt: skip
        size, latents = self._sizes(height, width, stock)
        plugged = self.plugins.during_call(
            control_images, plugin_strength, lambda: self._num_timesteps, num_images_per_prompt, latents
        )  # fmt: skip
        with plugged:
            # Adapters may change the English text encoder, so its texts are encoded with their strengths set.
            english, negative_english = self._english_features(
                prompt_en, negative_prompt_en, prompt_en_embeds, negative_prompt_en_embeds, count, clip_skip
            )
            bridge = Bridge(self.branch, share).attach(self.unet)
            try:
                with bridge.condition(condition), prepared_layers(self.vae) if share else nullcontext():
                    return super().__call__(
                        prompt_embeds=english, negative_prompt_embeds=negative_english, generator=generator,
                        num_images_per_prompt=num_images_per_prompt, **size, **stock,
                    )  # fmt: skip
            finally:
                bridge.detach()

    def _check_sides(self, height: int | None, width: int | None) -> None:
        for name, side in (("height", height), ("width", width)):
            factor = max(8, self.vae_scale_factor)
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

    def optimize(self, *, height: int | None = None, width: int | None = None, count: int = 1) -> Execution:
        """Prepare the networks, once for all calls to come, for the machine they are on.

        The pictures stay the same.

        On the CPU, weights are kept packed between calls, where a call otherwise packs them at its first step
        and unpacks them at its end (``bdm.speed.packing``); a parameter is empty meanwhile, and plug-ins,
        saving, loading and moving unpack it first. On a GPU, channels are put last and the repeated blocks
        are compiled. Called again, it starts afresh.

        Args:
            height: of the pictures to come in pixels, the model's own by default; other sizes work too.
            width: likewise.
            count: pictures at once.

        Returns:
            What was done and how long it took; ``.undo()`` takes it back.

        Raises:
            UserError: a size that is not a multiple of 8.
        """
        self._check_sides(height, width)
        _, latents = self._sizes(height, width, {})
        assert latents is not None
        if self._execution is not None:
            self._execution.undo()
        self._execution = Execution()
        self._execution.prepare(self, latents, count)
        return self._execution

    @property
    def plugins(self) -> Plugins:
        """The plug-ins attached to the backbone: checkpoint, VAE, adapters, ControlNets, embeddings."""
        if "_plugins" not in self.__dict__:
            self._plugins = Plugins(self)
        return self._plugins

    def _native_features(
        self, prompt: Texts | None, negative: Texts, embeds: Tensor | None, negative_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if embeds is not None:
            if prompt is not None:
                raise UserError("both prompt and prompt_embeds are given; give one of them")
            if negative_embeds is None:
                negative_embeds = self._encode_native(_spread(negative, len(embeds), "negative_prompt"))
            return embeds, _same_shape(negative_embeds, embeds, "negative_prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts:
            raise UserError('no prompt is given; give at least one native prompt, such as "红灯笼"')
        if negative_embeds is not None:
            positive = self._encode_native(prompts)
            return positive, _same_shape(negative_embeds, positive, "negative_prompt_embeds")
        # Together, so that positive and negative are padded to one length.
        positive, negative_features = self._encode_native(
            prompts + _spread(negative, len(prompts), "negative_prompt")
        ).chunk(2)
        return positive, negative_features

    def _encode_native(self, texts: list[str]) -> Tensor:
        if self.native_text_encoder is None:
            raise UserError(
                "the pipeline has no native text encoder; give prompt_embeds and negative_prompt_embeds"
            )
        return self.native_text_encoder(texts)  # as a call, so that hooks that offload it see it

    def _english_features(
        self,
        prompt: Texts,
        negative: Texts,
        embeds: Tensor | None,
        negative_embeds: Tensor | None,
        count: int,
        clip_skip: int,
    ) -> tuple[Tensor, Tensor]:
        if embeds is not None and negative_embeds is not None:
            embeds = embeds.expand(count, -1, -1) if len(embeds) == 1 else embeds
            return embeds, _same_shape(negative_embeds, embeds, "negative_prompt_en_embeds")
        texts = _spread(prompt, count, "prompt_en") + _spread(negative, count, "negative_prompt_en")
        # Equal texts are encoded once; there are few of them however many prompts there are.
        distinct = list(dict.fromkeys(texts))
        if self.text_encoder is not None:
            features = encode_english(distinct, self.text_encoder, self.tokenizer, clip_skip)
        elif self.empty_english is not None and distinct == [""] and clip_skip == 1:
            features = self.empty_english.to(self.unet.dtype)
        else:
            raise UserError(
                "the pipeline has no English text encoder; give prompt_en_embeds and"
                " negative_prompt_en_embeds, or load it with english=True"
            )
        ours, theirs = features[[distinct.index(text) for text in texts]].chunk(2)
        ours = ours if embeds is None else _same_shape(embeds, ours, "prompt_en_embeds")
        return ours, (
            theirs
            if negative_embeds is None
            else _same_shape(negative_embeds, ours, "negative_prompt_en_embeds")
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a standard diffusers folder with the parts ``branch`` and ``native_text_encoder`` in it."""
        native, self.native_text_encoder = self.native_text_encoder, None
        try:
            super().save_pretrained(save_directory, **options)
        finally:
            self.native_text_encoder = native
        if native is not None:
            native.save_pretrained(Path(save_directory) / "native_text_encoder")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        backbone: str | Path | None = None,
        branch: str | Path | BranchModel | None = None,
        native_text_encoder: str | Path | NativeTextEncoder | None = None,
        vae: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        english: bool = True,
        **parts: Any,
    ) -> Any:
        """Load a bilingual pipeline.

        Args:
            source: folder or hub name written by ``save_pretrained``.
            backbone: another SD1.5 model (single file, folder or hub name) instead of the folder's own.
            branch: another branch.
            native_text_encoder: another native text encoder.
            vae: another VAE (file or folder).
            torch_dtype: dtype of all weights.
            english: load the English text encoder. Without it "" is the only English prompt; what it says of
                that is kept in the user's cache from the first time on, and memory and time are spared.
            parts: further components, such as ``controlnet``.

        Raises:
            UserError: missing, damaged or unfitting files.
        """
        folder = resolve_folder(source)
        empty = None if english else empty_prompt_features(backbone or folder, torch_dtype)
        stock = load_backbone(backbone or folder, torch_dtype, vae, english)
        if not isinstance(branch, BranchModel):
            branch = BranchModel.from_pretrained(branch or folder / "branch", torch_dtype=torch_dtype)
        if not isinstance(native_text_encoder, NativeTextEncoder):
            native_text_encoder = NativeTextEncoder.from_pretrained(
                native_text_encoder or folder / "native_text_encoder", torch_dtype=torch_dtype
            )
        pipe = cls(
            vae=stock.vae, text_encoder=stock.text_encoder, tokenizer=stock.tokenizer, unet=stock.unet,
            scheduler=stock.scheduler, branch=branch.eval(), native_text_encoder=native_text_encoder, **parts,
        )  # fmt: skip
        pipe.empty_english = empty
        return pipe


def _spread(texts: Texts, count: int, name: str) -> list[str]:
    """One text for all prompts, or one for each."""
    spread = [texts] * count if isinstance(texts, str) else list(texts)
    if len(spread) != count:
        raise UserError(f"{name} has {len(spread)} texts for {count} prompts; give one, or one for each")
    return spread


def _same_shape(given: Tensor, wanted: Tensor, name: str) -> Tensor:
    given = given.expand(wanted.shape[0], -1, -1) if len(given) == 1 else given
    if given.shape != wanted.shape:
        raise UserError(
            f"{name} has shape {tuple(given.shape)}, the positive features have {tuple(wanted.shape)}; they"
            " must be equal"
        )
    return given


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

    # diffusers reads a pipeline's components off the signature of its constructor, so it is written out here.
    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        branch: BranchModel,
        native_text_encoder: NativeTextEncoder | None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        self._check_parts(unet, branch, native_text_encoder)
        StableDiffusionControlNetPipeline.__init__(
            self,
            vae,
            text_encoder,
            tokenizer,
            unet,
            controlnet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(branch=branch, native_text_encoder=native_text_encoder)
