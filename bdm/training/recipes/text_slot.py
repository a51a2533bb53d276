"""A UNet that is told native texts in the place of English ones, and what of the two is trained."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.backbone import Backbone
from ...models.distance import weight_distance
from ...speed.lean_backward import lean_backward
from ...text.connector import Connector
from ...text.native import NativeTextEncoder
from .captions import NativeCaptions
from .denoising import Denoiser
from .preview import StockPreview

#: What can be trained, in the order in which parts are numbered.
TrainedPart = Literal["text_encoder", "connector", "unet", "cross_attention"]
PARTS: tuple[TrainedPart, ...] = ("text_encoder", "connector", "unet", "cross_attention")
#: Which of a UNet's cross-attention: what reads the text, or all of it.
Attention = Literal["keys_values", "all"]


class TextSlotDenoiser(Denoiser):
    """A latent diffusion model whose text is native.

    Args:
        stock: the latent diffusion model. Its English text encoder, if it has one, stays as it is.
        native: the native text encoder; its features go where CLIP's went.
        train: what of it all is trained.
        attention: which cross-attention weights ``cross_attention`` means.
        before: the UNet's weights that the finished model is compared with, called when it is; None where it
            began from nothing.
        moments: see ``Recipe.moments``.

    Raises:
        UserError: features of another width than the UNet reads, or parts that are not there.
    """

    def __init__(
        self,
        stock: Backbone,
        native: NativeTextEncoder,
        train: Sequence[TrainedPart] = ("text_encoder",),
        attention: Attention = "keys_values",
        before: Any = None,
        moments: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        captions = NativeCaptions(native)
        self._stock, self._before, self._moments = stock, before, moments or {}
        self._train: list[TrainedPart] = [part for part in PARTS if part in train]
        self._attention: Attention = attention
        check_width(stock.unet, native)
        super().__init__(stock.unet, captions, StockPreview(stock, captions))
        self.native_text_encoder = native
        if not {"unet", "cross_attention"} & set(train):
            self._lighten(stock.unet)
        if "text_encoder" in train and getattr(native.model, "pooler", None) is not None:
            # It reads the hidden states and is not part of them: processes would wait for its gradients.
            setattr(native.model, "pooler", None)  # noqa: B010  # not every model declares one
        if "connector" in train and native.connector is None:
            raise UserError(
                "recipe.train names connector, and there is none; give recipe.connector, or leave it out"
            )

    def _lighten(self, unet: Any) -> None:
        """Let a UNet that stays as it is keep no more than its text's gradients need.

        It ends with the denoiser, or with the process while its modules are still there.
        """
        hung = ExitStack()
        weakref.finalize(self, hung.close)
        hung.enter_context(lean_backward(unet))

    def parts(self) -> dict[str, nn.Module]:
        return {name: module for part in self._train for name, module in self.part(part).items()}

    def part(self, name: TrainedPart) -> dict[str, nn.Module]:
        """The modules of a part by their names."""
        match name:
            case "text_encoder":
                return {name: self.native_text_encoder.model}
            case "connector":
                connector = self.native_text_encoder.connector
                return {} if connector is None else {name: connector}
            case "unet":
                return {name: self.unet}
        return {
            f"{name}_{place.replace('.', '_')}": module
            for place, module in cross_attention(self.unet, self._attention).items()
        }

    def recomputable(self) -> dict[str, Any]:
        return {"unet": self.unet, "text_encoder": self.native_text_encoder.model}

    def keep_frozen(self) -> None:
        self.native_text_encoder.keep_states = "text_encoder" not in self._train

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, **given: Tensor) -> Tensor:
        """See ``Denoiser``; a frozen encoder may be kept in another precision."""
        return super().predict(x_t, t, text.to(self.unet.dtype), **given)

    def moments(self) -> Mapping[str, Mapping[str, Any]]:
        return self._moments

    def facts(self) -> dict[str, Any]:
        """By how much the UNet moved from the one that it began as, if it could."""
        if self._before is None or not {"unet", "cross_attention"} & set(self._train):
            return {}
        moved = weight_distance(self.unet.state_dict(), self._before())
        return {
            "unet_tensors_changed": round(moved.changed, 4),
            "unet_relative_distance": round(moved.relative, 6),
        }

    def save(self, folder: Path) -> None:
        """Write a pipeline's folder without a branch: English CLIP in ``text_encoder``, the native encoder in
        ``native_text_encoder``.
        """
        from ...pipeline import BridgePipeline

        stock, branch = self._stock, None
        native = self.native_text_encoder
        # What no step changed need not be stored again.
        native.save_by_name = native.package is not None and "text_encoder" not in self._train
        pipe: Any = BridgePipeline(
            stock.vae,
            stock.text_encoder,
            stock.tokenizer,
            stock.unet,
            stock.scheduler,
            branch,  # pyright: ignore[reportArgumentType]
            native,
        )
        pipe.save_pretrained(folder)


def cross_attention(unet: nn.Module, which: Attention = "keys_values") -> dict[str, nn.Module]:
    """The modules of a UNet's cross-attention that hold weights, by their places.

    Args:
        unet: diffusers' UNet; its cross-attention is called ``attn2``.
        which: the projections that read the text, or all.
    """
    ends = (".to_k", ".to_v", *([".to_q", ".to_out.0"] if which == "all" else []))
    return {
        place: module
        for place, module in unet.named_modules()
        if ".attn2." in f".{place}" and place.endswith(ends)
    }


def check_width(unet: Any, native: NativeTextEncoder) -> None:
    """Refuse a text encoder whose features a UNet does not read.

    Raises:
        UserError: names both widths.
    """
    wanted = unet.config["cross_attention_dim"]
    if native.text_dim != wanted:
        raise UserError(
            f"the native text encoder's features are {native.text_dim} wide and the UNet reads {wanted}; give"
            " another text encoder, or recipe.connector: {} to bring them to its width"
        )


def with_connector(
    native: NativeTextEncoder, width: int, hidden: int = 0, depth: int = 0, seed: int = 0
) -> NativeTextEncoder:
    """The same text encoder with a fresh connector to another width (``hidden``, ``depth``: see there).

    Raises:
        UserError: it has one already.
    """
    if native.connector is not None:
        raise UserError("the native text encoder has a connector already; leave recipe.connector out")
    torch.manual_seed(seed)
    positions = native.layout.length if depth else 0
    connector = Connector(native.text_dim, width, hidden, depth, positions)
    connected = NativeTextEncoder(native.model, native.tokenizer, native.settings, connector)
    connected.package = native.package
    return connected
