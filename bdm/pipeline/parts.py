"""What a bilingual pipeline is made of, and how diffusers' ways of making pipelines make one."""

# A mixin calls the methods of the stock pipeline it is mixed into, which the type checker cannot see.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

# diffusers reads the types of a pipeline's parts off its constructor, so these are the types themselves.
from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import logging
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..errors import UserError, printable
from ..method.branch import BranchModel
from ..method.bridge import Bridge
from ..text.native import NativeTextEncoder
from .loading import PipelineKeywords, keep_empty_english, load_parts
from .reuse import reuse_parts
from .text_slot import check_text_slot

#: Where diffusers tells its users what it loads.
_LOGGER = logging.get_logger("diffusers.pipelines.pipeline_utils")

#: The VAEs that stock pipelines draw with.
Vae = AutoencoderKL | AutoencoderTiny | AsymmetricAutoencoderKL | ConsistencyDecoderVAE


class PartsMixin:
    """The parts of a bilingual pipeline: those of the stock pipeline, a branch, a native text encoder."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    branch: Any
    native_text_encoder: NativeTextEncoder | None

    #: (1, 77, D) features of the English prompt "", for pipelines without an English text encoder.
    empty_english: Tensor | None = None

    #: The branch is none of the sequence: it comes with the UNet's first step and stays to the end of the
    #: call.
    model_cpu_offload_seq = "native_text_encoder->text_encoder->image_encoder->unet->vae"

    _optional_components: ClassVar[list[str]] = [
        "safety_checker", "feature_extractor", "image_encoder", "native_text_encoder", "branch"
    ]  # fmt: skip

    def __init__(
        self,
        vae: Vae,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        branch: BranchModel | None,
        native_text_encoder: NativeTextEncoder | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """Put a pipeline together.

        As in diffusers, a part may be None where its work is not asked for: a pipeline of text encoders alone
        encodes, one without a VAE draws latents. One without a branch tells the UNet what the native text
        encoder says, in the place of English CLIP's features or in front of them.

        Raises:
            UserError: parts that do not fit each other.
        """
        check_parts(unet, branch, native_text_encoder)
        super().__init__(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )  # fmt: skip
        self.register_modules(branch=branch, native_text_encoder=native_text_encoder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        backbone: str | Path | None = None,
        english: bool = True,
        **options: Unpack[PipelineKeywords],
    ) -> Self:
        """Load a bilingual pipeline.

        Args:
            source: folder or hub name written by ``save_pretrained``, or a released system of SD1.5's shape:
                Japanese Stable Diffusion, Taiyi, AltDiffusion m2 or m9, SkyPaint, PAI-Diffusion. Its text
                encoder becomes the ``native_text_encoder``; there is no branch, and no English text encoder
                unless ``text_encoder`` and ``tokenizer`` are given.
            backbone: another SD1.5 model (single file, folder or hub name) instead of the folder's own.
            english: load the English text encoder. Without it "" is the only English prompt; what it says of
                that is kept in the user's cache from the first time on, and memory and time are spared.
            options: as in diffusers. Parts that are there already (``unet``, ``scheduler`` ...; ``branch``,
                ``native_text_encoder``, ``vae`` and ``controlnet`` also by path or hub name), None for those
                to leave out; ``dtype`` (float32 by default, "auto" for the files' own, or a mapping by part),
                ``variant``, ``use_safetensors``, ``device_map`` ... See ``PipelineKeywords`` and
                ``bdm.formats.load_options.LoadKeywords``.

        Returns:
            The pipeline, in evaluation mode and without gradients.

        Raises:
            UserError: missing, damaged or unfitting files, or an option that is not known or not done here.
        """
        return cls._loaded("from_pretrained", source, backbone, english, dict(options))

    @classmethod
    def from_single_file(
        cls, file: str | Path, *, english: bool = True, **options: Unpack[PipelineKeywords]
    ) -> Self:
        """Load a checkpoint in one file and put a branch on it; nothing goes online for it.

        Args:
            file: an SD1.5 checkpoint in the original layout.
            english: load the English text encoder, as in ``from_pretrained``.
            options: as in ``from_pretrained``; ``branch`` and ``native_text_encoder`` are needed.

        Raises:
            UserError: see ``from_pretrained``.
        """
        if not os.path.isfile(file):  # which takes names of any length
            named = printable(file, 300)
            raise UserError(f"{named}: no such file; give a checkpoint, or a folder to from_pretrained")
        return cls._loaded("from_single_file", None, file, english, dict(options))

    @classmethod
    def _loaded(
        cls,
        reader: str,
        source: str | Path | None,
        backbone: str | Path | None,
        english: bool,
        options: dict[str, Any],
    ) -> Self:
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        parts = load_parts(f"{cls.__name__}.{reader}", names, source, backbone, english, options)
        for name in parts.arguments:
            _LOGGER.info("Loaded %s of %s.", name, source or backbone)
        pipe: Any = cls(**parts.arguments)
        pipe.empty_english = parts.empty_english
        pipe.register_to_config(_name_or_path=str(source or backbone))
        if parts.moved_unet:
            pipe.register_to_config(_moved_unet=parts.moved_unet)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:
        """Another kind of pipeline around the same parts, and branches beside; no memory is needed for them.

        Args:
            pipeline: a bilingual pipeline, or a stock one of SD1.5; a stock one has no ``branch``, so that is
                given beside it, with a ``native_text_encoder``.
            changes: other parts than the pipeline's, and ``dtype``, to which all parts (the pipeline's too)
                are cast. Without it they stay as they are, where diffusers casts to float32.

        Raises:
            UserError: a part that is missing or does not fit.
        """
        reused = reuse_parts(cls, pipeline, changes)
        made: Any = cls(**reused.arguments)
        made.register_to_config(**reused.noted)
        if made.text_encoder is None:
            made.empty_english = getattr(pipeline, "empty_english", None)
        for name, voice in getattr(pipeline, "voices", {}).items():
            made.add_branch(name, voice.branch, voice.native_text_encoder)
        return made if reused.dtype is None else made.to(dtype=reused.dtype)

    @property
    def moved_unet(self) -> str:
        """Why the UNet is not SD1.5's any more; "" where nothing says that it was trained for native text.

        On such a UNet checkpoints are attached as differences to SD1.5 (``base=``).
        """
        return str(self.config.get("_moved_unet") or "")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a standard diffusers folder with the parts ``branch`` and ``native_text_encoder`` in it.

        Args:
            save_directory: the folder; made if it is not there.
            options: as in diffusers: ``variant``, ``safe_serialization``, ``max_shard_size`` ...
        """
        without = self.text_encoder is None
        keep_empty_english(self.empty_english if without else None, Path(save_directory))
        super().save_pretrained(save_directory, **options)


def check_parts(unet: Any, branch: Any, native_text_encoder: NativeTextEncoder | None) -> None:
    """Refuse parts that do not fit each other; parts that are None fit everything.

    Raises:
        UserError: says what does not fit.
    """
    if branch is None:
        check_text_slot(unet, native_text_encoder)
        return
    width = branch.config["cross_attention_dim"]
    if native_text_encoder is not None and native_text_encoder.text_dim != width:
        raise UserError(
            f"the native text encoder's features are {native_text_encoder.text_dim} wide and the branch"
            f" reads {width}; use the text encoder that the branch was trained with"
        )
    if unet is not None:
        Bridge(branch).check(unet)
