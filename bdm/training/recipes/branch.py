"""Native captions -> the branch of a Bridge Diffusion Model."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.source import Source
from ...formats.weights import DTYPES
from ...method.branch import BranchModel
from ...method.bridge import Bridge
from ...method.condition import NativeCondition
from ...models.backbone import Backbone, decode_latents, load_backbone
from ...speed.lean_backward import lean_backward
from ...text.native import NativeTextEncoder
from .denoising import DenoisingRecipe


class BranchRecipe(DenoisingRecipe):
    """Trains the branch: backbone frozen and fed "", native captions through the branch (arXiv 2309.00952,
    equation 3).

    Args:
        backbone: the backbone, or folder, single file or hub name of an SD1.5 model.
        native_text_encoder: the native text encoder, or its folder or file.
        branch: folder or hub name of a trained branch to start from, such as the released one; a fresh one if
            None.
        shuffle_captions: give every picture another picture's caption (a control that must not learn).
        frozen_dtype: precision in which UNet and text encoders, which are frozen, are kept; the VAE stays in
            fp32, because SD1.5's overflows in fp16. The branch is copied before, so it starts from full
            precision.
        rest: see ``DenoisingRecipe``.
    """

    def __init__(
        self,
        source: Source,
        backbone: str | Backbone,
        native_text_encoder: str | NativeTextEncoder,
        branch: str | None = None,
        shuffle_captions: bool = False,
        frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        seed: int = 0,
        **rest: Any,
    ) -> None:
        from ...text.english import encode_english

        stock = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
        super().__init__(
            source, stock.vae, seed=seed, inherited=stock.scheduler.config["prediction_type"], **rest
        )
        self.unet = stock.unet
        native = native_text_encoder
        self.native_text_encoder = (
            native if isinstance(native, NativeTextEncoder) else NativeTextEncoder.from_pretrained(native)
        )
        self.check_cache(backbone, (native, self.native_text_encoder))
        torch.manual_seed(seed)
        if branch is None:
            self.branch = BranchModel.from_backbone(self.unet, self.native_text_encoder.text_dim)
        else:
            self.branch = BranchModel.from_pretrained(branch, torch_dtype=torch.float32)
        self.bridge = Bridge(self.branch).attach(self.unet)
        frugal = ExitStack()
        frugal.enter_context(lean_backward(self.unet))
        # Ends with the recipe, or with the process while its modules are still there.
        weakref.finalize(self, frugal.close)
        # The English side is always "" in training: encoded once, its encoder is then not needed any more.
        dtype = DTYPES[frozen_dtype]
        empty = encode_english([""], stock.text_encoder, stock.tokenizer).to(dtype)
        self.register_buffer("empty_english", empty, persistent=False)
        self.empty_english: Tensor
        for frozen in (self.unet, self.native_text_encoder, stock.text_encoder):
            # nn.Module's own: ModelMixin's warns about float32 modules even where there are none.
            nn.Module.to(frozen.requires_grad_(False), dtype)
        self._components = {
            "scheduler": stock.scheduler,
            "text_encoder": stock.text_encoder,
            "tokenizer": stock.tokenizer,
        }
        self._shuffle = (
            random.Random(seed).sample(range(len(source)), len(source)) if shuffle_captions else None
        )

    def parts(self) -> dict[str, nn.Module]:
        return {"branch": self.branch}

    def recomputable(self) -> dict[str, Any]:
        # Gradients reach the branch through the backbone's decoder; its encoder keeps nothing anyway.
        return {"branch": self.branch, "decoder": self.unet}

    def encode_texts(self, texts: Sequence[str | Tensor]) -> Tensor:
        return self.native_text_encoder.encode(texts)

    def caption_of(self, batch: Batch) -> Sequence[str | Tensor]:
        if self._shuffle is None:
            return batch.text_inputs
        return [self.source.caption(self._shuffle[i]) for i in batch.indices]

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with self.bridge.condition(NativeCondition(text)):
            return self.unet(x_t.to(self.unet.dtype), t, self.empty_english.expand(len(x_t), -1, -1)).sample

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        from ...pipeline import BridgePipeline

        pipe = BridgePipeline(
            vae=self.vae,
            unet=self.unet,
            branch=self.branch,
            native_text_encoder=self.native_text_encoder,
            **self._components,
        )
        pipe.set_progress_bar_config(disable=True)
        # The pipeline brings a bridge of its own.
        self.bridge.detach()
        try:
            latents = pipe(
                list(prompts),
                seed=seed,
                num_inference_steps=30,
                guidance_scale=self.grid_guidance,
                output_type="latent",
                # Packing moves weights, and these belong to the optimizer and to whoever spreads them over
                # processes.
                share=False,
            ).images
        finally:
            self.bridge.attach(self.unet)
        return decode_latents(self.vae, latents)

    def save(self, folder: Path) -> None:
        self.branch.save_pretrained(folder)
