"""Native captions -> the branch of a Bridge Diffusion Model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...data.source import Source
from ...errors import UserError
from ...formats.weights import DTYPES
from ...method.branch import BranchModel
from ...method.bridge import Bridge
from ...method.condition import NativeCondition
from ...models.backbone import Backbone, decode_latents
from ...models.fingerprint import refuse_other_vae, vae_sketch
from ...speed.lean_backward import lean_backward
from ...text.english import encode_english
from ...text.native import NativeTextEncoder
from .captions import NativeCaptions
from .community import load_stock
from .denoising import Denoiser, DenoisingRecipe
from .pool import BackbonePool
from .prepared import check_prepared


class BridgePreview:
    """Draws with a ``BridgePipeline`` of a recipe's own parts.

    Args:
        stock: the backbone.
        native_text_encoder: of the native language.
        bridge: the recipe's; it steps aside while the pipeline's own is there.
    """

    def __init__(self, stock: Backbone, native_text_encoder: NativeTextEncoder, bridge: Bridge) -> None:
        self._stock, self._native, self._bridge = stock, native_text_encoder, bridge

    def draw(self, prompts: Sequence[str], guidance: float, seed: int, held_out: Source) -> Tensor:
        """See ``Preview``."""
        from ...pipeline import BridgePipeline

        stock, bridge = self._stock, self._bridge
        pipe = BridgePipeline(
            stock.vae,
            stock.text_encoder,
            stock.tokenizer,
            stock.unet,
            stock.scheduler,
            bridge.branch,
            self._native,
        )
        pipe.set_progress_bar_config(disable=True)
        bridge.detach()
        try:
            latents = pipe(
                list(prompts),
                seed=seed,
                num_inference_steps=30,
                guidance_scale=guidance,
                output_type="latent",
                # The plain way: what belongs to the optimizer, and to whoever splits it over processes, is
                # neither moved nor put into another form.
                share=False,
            ).images
        finally:
            bridge.attach(stock.unet)
        return decode_latents(stock.vae, latents)


class BranchDenoiser(Denoiser):
    """The branch learns on a frozen backbone, which is fed "" (arXiv 2309.00952, equation 3).

    Args:
        stock: the backbone.
        native_text_encoder: of the native language.
        branch: what is trained.
        captions: what it is told.
        dtype: precision in which UNet and text encoders, which are frozen, are kept; the VAE stays in fp32,
            because SD1.5's overflows in fp16.

    Raises:
        UserError: the backbone has no English text encoder, has a bridge already, or does not fit the branch.
    """

    def __init__(
        self,
        stock: Backbone,
        native_text_encoder: NativeTextEncoder,
        branch: BranchModel,
        captions: NativeCaptions,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if stock.text_encoder is None:
            raise UserError(
                'the backbone has no English text encoder, and the branch learns beside its prompt ""; give a'
                " backbone with one"
            )
        bridge = Bridge(branch)
        super().__init__(stock.unet, captions, BridgePreview(stock, native_text_encoder, bridge))
        self.branch, self.native_text_encoder, self.bridge = branch, native_text_encoder, bridge
        self._sketch = partial(vae_sketch, stock.vae)
        hung = ExitStack()
        # Ends with the denoiser, or with the process while its modules are still there.
        weakref.finalize(self, hung.close)
        bridge.attach(stock.unet)
        hung.callback(bridge.detach)
        hung.enter_context(lean_backward(stock.unet))
        # The English side is always "" in training: encoded once, its encoder is then not needed any more.
        with torch.no_grad():  # whoever gives the encoder may have left it ready to be trained
            empty = encode_english([""], stock.text_encoder, stock.tokenizer).to(dtype)
        self.register_buffer("empty_english", empty, persistent=False)
        self.empty_english: Tensor
        for frozen in (stock.unet, native_text_encoder, stock.text_encoder):
            # nn.Module's own: ModelMixin's warns about float32 modules even where there are none.
            nn.Module.to(frozen.requires_grad_(False), dtype)

    def parts(self) -> dict[str, nn.Module]:
        return {"branch": self.branch}

    def recomputable(self) -> dict[str, Any]:
        # Gradients reach the branch through the backbone's decoder; its encoder keeps nothing anyway.
        return {"branch": self.branch, "decoder": self.unet}

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, english: Tensor | None = None, **given: Tensor
    ) -> Tensor:
        """The prediction for (B, C, h, w) latents at timesteps (B,), told native features (B, L, D).

        The backbone is told ``english`` (B, M, E), or "".
        """
        if english is None:
            english = self.empty_english.expand(len(x_t), -1, -1)
        with self.bridge.condition(NativeCondition(text)):
            return self.unet(x_t.to(self.unet.dtype), t, english).sample

    def facts(self) -> dict[str, Any]:
        """Of which VAE the latents were that it learned."""
        return {"vae": self._sketch()}

    def save(self, folder: Path) -> None:
        """Write a folder with the branch alone."""
        self.branch.save_pretrained(folder)


def branch_recipe(
    source: Source,
    backbone: str | Backbone,
    native_text_encoder: str | NativeTextEncoder,
    *,
    branch: str | None = None,
    fresh_text: bool = False,
    shuffle_captions: bool = False,
    frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    pool: Mapping[str, Any] | None = None,
    bilingual: float = 0.0,
    distill: bool = False,
    seed: int = 0,
    **rest: Any,
) -> DenoisingRecipe:
    """Train the branch of a Bridge Diffusion Model.

    Args:
        source: pictures with native captions.
        backbone: the backbone, or folder, single file or hub name of an SD1.5 model.
        native_text_encoder: the native text encoder, or its folder or file.
        branch: folder or hub name of a trained branch to start from, such as the released one; a fresh one if
            None.
        fresh_text: the layers of that branch that read the text start anew, for features of another native
            text encoder, whatever their width.
        shuffle_captions: see ``NativeCaptions``.
        frozen_dtype: see ``BranchDenoiser``. The branch is copied before, so it starts from full precision.
        pool: arguments of ``BackbonePool`` and ``RobustBranchRecipe``'s ``target``; None trains on the
            backbone alone, as the paper does.
        bilingual: see ``RobustBranchRecipe``.
        distill: likewise.
        seed: seed of the run.
        rest: see ``DenoisingRecipe``.

    Raises:
        UserError: the parts do not fit each other, or their files cannot be read.
    """
    stock, native = load_stock(backbone), native_text_encoder
    if not isinstance(native, NativeTextEncoder):
        native = NativeTextEncoder.from_pretrained(native)
    check_prepared(source, vae=(backbone, stock.vae), native=(native_text_encoder, native))
    if branch is not None:
        refuse_other_vae(branch, stock.vae, backbone if isinstance(backbone, str) else "the backbone")
    denoiser = BranchDenoiser(
        stock,
        native,
        _branch(branch, fresh_text, stock.unet, native.text_dim, seed),
        NativeCaptions(native, source if shuffle_captions else None, seed),
        DTYPES[frozen_dtype],
    )
    inherited = stock.scheduler.config["prediction_type"]
    if pool is None and not bilingual and not distill:
        return DenoisingRecipe(source, denoiser, stock.vae, inherited=inherited, seed=seed, **rest)
    from .robust import RobustBranchRecipe

    settings = dict(pool or {})
    target = settings.pop("target", "caption")
    backbones = BackbonePool(stock, **settings) if pool is not None else None
    return RobustBranchRecipe(
        source, denoiser, stock, backbones, bilingual, target, distill, inherited=inherited, seed=seed, **rest
    )


def _branch(trained: str | None, fresh_text: bool, unet: Any, text_dim: int, seed: int) -> BranchModel:
    torch.manual_seed(seed)
    if trained is None:
        if fresh_text:
            raise UserError("fresh_text is of a trained branch, and none is given; name it as branch")
        return BranchModel.from_backbone(unet, text_dim)
    branch = BranchModel.from_pretrained(trained, torch_dtype=torch.float32)
    if fresh_text:
        return branch.with_fresh_text(text_dim)
    width = branch.config["cross_attention_dim"]
    if width != text_dim:
        raise UserError(
            f"the branch in {trained} reads text of width {width}, and the native text encoder's is"
            f" {text_dim}; give the encoder that it was trained with, or let its layers that read the text"
            " start anew with fresh_text: true"
        )
    return branch
