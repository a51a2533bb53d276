"""What the English community makes.

Fine-tuned checkpoints, LoRAs, ControlNets and embeddings, on the backbone alone.

None of these recipes knows of the branch or of a native language; they exist so that plug-ins of every kind
can be made and measured where nothing can be downloaded. They write the file forms that are shared on
Civitai.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.source import Source, UnreadableExample
from ...errors import UserError
from ...formats.checkpoint import CONFIG_KEY, write_checkpoint
from ...formats.names import flat, text_to_plain
from ...models.backbone import Backbone, load_backbone
from ...plugins.controlnet import canny_edges, control_tensor
from ...text.english import encode_english, trigger_tokens
from .denoising import DenoisingRecipe
from .preview import draw_stock, stock_pipeline


class CommunityRecipe(DenoisingRecipe):
    """Trains something on a frozen backbone with English captions.

    Args:
        source: pictures with English captions.
        backbone: the backbone, or folder, single file or hub name of an SD1.5 model.
        trigger: word appended to every caption (", word"); "" for none. A dropped caption keeps it, so that
            the word alone means the style and nothing of any content, as it must where another language says
            what to draw.
        seed: seed of the run.
        rest: see ``DenoisingRecipe``.
    """

    def __init__(
        self, source: Source, backbone: str | Backbone, trigger: str = "", seed: int = 0, **rest: Any
    ) -> None:
        stock = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
        super().__init__(
            source, stock.vae, seed=seed, inherited=stock.scheduler.config["prediction_type"], **rest
        )
        self.check_cache(backbone)
        self.unet, self.text_encoder, self.tokenizer = stock.unet, stock.text_encoder, stock.tokenizer
        self.scheduler = stock.scheduler
        self.trigger = trigger

    def recomputable(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def caption_of(self, batch: Batch) -> list[str]:
        return [self._captioned(text) for text in batch.captions]

    @property
    def dropped_caption(self) -> str:
        return self.trigger

    def _captioned(self, text: str) -> str:
        return f"{text}, {self.trigger}" if self.trigger else text

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return encode_english(texts, self.text_encoder, self.tokenizer)

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(x_t, t, text).sample

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        return self._draw(prompts, seed)

    def _draw(self, prompts: Sequence[str], seed: int, controlnet: Any = None, **inputs: Any) -> Tensor:
        pipe = stock_pipeline(
            self.vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler, controlnet
        )
        positive = self.encode_texts([self._captioned(prompt) for prompt in prompts])
        negative = self.encode_texts([""] * len(prompts))
        return draw_stock(pipe, positive, negative, self.grid_guidance, seed, **inputs)


class CheckpointRecipe(CommunityRecipe):
    """Fine-tunes the whole UNet (DreamBooth without a trigger) and writes a single file in the original
    layout.
    """

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` in half precision: UNet and text encoder, without VAE ("pruned")."""
        weights = {
            "unet": self.unet.state_dict(),
            "text_encoder": text_to_plain(self.text_encoder.state_dict()),
        }
        tensors = {key: tensor.half().contiguous() for key, tensor in write_checkpoint(weights).items()}
        configs = {
            "unet": json.loads(self.unet.to_json_string()),
            "text_encoder": json.loads(self.text_encoder.config.to_json_string()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt", CONFIG_KEY: json.dumps(configs)})


class LoraRecipe(CommunityRecipe):
    """Trains a LoRA with peft on the UNet's attention projections and writes it under kohya's names.

    Args:
        rank: of the factors.
        alpha: the change is scaled by alpha / rank.
        rest: see ``CommunityRecipe``.
    """

    def __init__(self, source: Source, rank: int = 8, alpha: int = 8, **rest: Any) -> None:
        from peft import LoraConfig

        super().__init__(source, **rest)
        torch.manual_seed(rest.get("seed", 0))
        self.rank, self.alpha = rank, alpha
        targets = [
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "proj_in",
            "proj_out",
            "ff.net.0.proj",
            "ff.net.2",
            "conv1",
            "conv2",
        ]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))

    def parts(self) -> dict[str, nn.Module]:
        return {
            name.replace(".", "_"): module
            for name, module in self.unet.named_modules()
            if name.endswith((".lora_A", ".lora_B"))
        }

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` with the header that kohya's trainer writes."""
        tensors = {}
        for name, module in self.unet.named_modules():
            if not name.endswith(".lora_A"):
                continue
            owner = name.removesuffix(".lora_A")
            up: Any = self.unet.get_submodule(f"{owner}.lora_B")
            key = f"lora_unet_{flat(owner)}"
            tensors[f"{key}.lora_down.weight"] = module.default.weight.half().contiguous()  # pyright: ignore[reportAttributeAccessIssue]
            tensors[f"{key}.lora_up.weight"] = up.default.weight.half().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha))
        folder.mkdir(parents=True, exist_ok=True)
        noted = {
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
            "modelspec.trigger_phrase": self.trigger,
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt", **noted})


class EmbeddingRecipe(CommunityRecipe):
    """Learns the vectors of a word (textual inversion, arXiv 2208.01618) and writes them in A1111's form.

    Args:
        trigger: the word.
        vectors: how many it stands for.
        initial: word whose token they start as.
        rest: see ``CommunityRecipe``.
    """

    def __init__(
        self, source: Source, trigger: str, vectors: int = 2, initial: str = "background", **rest: Any
    ) -> None:
        from tokenizers import AddedToken

        super().__init__(source, trigger=trigger, **rest)
        table: Any = self.text_encoder.get_input_embeddings()
        start = table.weight[self.tokenizer(initial, add_special_tokens=False).input_ids[0]].detach()
        generator = torch.Generator().manual_seed(rest.get("seed", 0))
        rows = start.expand(vectors, -1) + 0.01 * torch.randn(vectors, len(start), generator=generator)
        self.vectors = nn.ParameterDict({"rows": nn.Parameter(rows)})
        tokens: Any = [AddedToken(token, normalized=False) for token in trigger_tokens(trigger, vectors)]
        self.tokenizer.add_tokens(tokens)
        self._known = len(table.weight)
        table.register_forward_hook(self._insert)
        # The lookup itself stays inside the table; the rows are put in by the hook.
        table.weight = nn.Parameter(
            torch.cat([table.weight.detach(), torch.zeros_like(rows)]), requires_grad=False
        )

    def _insert(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = inputs[0] - self._known
        return torch.where((own >= 0)[..., None], self.vectors["rows"][own.clamp(min=0)], output)

    def parts(self) -> dict[str, nn.Module]:
        return {"vectors": self.vectors}

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Features with gradients to the vectors: nothing can be kept between steps."""
        return self.encode_texts(captions)

    def save(self, folder: Path) -> None:
        """Write ``TRIGGER.pt`` as A1111 does."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.vectors["rows"].detach().clone()
        content = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": rows},
            "name": self.trigger,
            "step": 0,
        }
        torch.save(content, folder / f"{self.trigger}.pt")


class ControlNetRecipe(CommunityRecipe):
    """Trains a ControlNet (arXiv 2302.05543) on the Canny edges of the pictures.

    Args:
        widths: channels of the condition path; each step but the first halves the picture's side.
        condition: what the ControlNet is shown; edges by Canny.
        rest: see ``CommunityRecipe``; ``cache`` must be off, for the edges need the pictures.
    """

    def __init__(
        self,
        source: Source,
        widths: tuple[int, ...] = (16, 32, 96),
        condition: Literal["canny"] = "canny",
        **rest: Any,
    ) -> None:
        from diffusers import ControlNetModel

        super().__init__(source, **rest)
        torch.manual_seed(rest.get("seed", 0))
        self.controlnet: Any = ControlNetModel.from_unet(
            self.unet, conditioning_embedding_out_channels=widths
        )
        self.condition = condition
        self._edges: Tensor | None = None

    def parts(self) -> dict[str, nn.Module]:
        return {"controlnet": self.controlnet}

    def recomputable(self) -> dict[str, Any]:
        return {"controlnet": self.controlnet, "decoder": self.unet}

    def errors(self, batch: Batch, t: Tensor, captions: Sequence[str]) -> Tensor:
        assert batch.pixels is not None, "edges need pictures: set cache: false"
        pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in batch.pixels]
        self._edges = edge_tensor(pictures).to(self.vae.device)
        return super().errors(batch, t, captions)

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        down, middle = self.controlnet(x_t, t, text, self._edges, return_dict=False)
        return self.unet(
            x_t, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample

    def sample(self, prompts: Sequence[str], seed: int) -> Tensor:
        held_out = self.source.validation
        chosen = {}
        for i in range(len(held_out)):
            with suppress(UnreadableExample):
                chosen[held_out.caption(i)] = i
        # A prompt of one's own gets the edges of some validation picture.
        pixels = [_usable_picture(held_out, chosen.get(prompt, i)) for i, prompt in enumerate(prompts)]
        pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
        return self._draw(prompts, seed, self.controlnet, image=edge_tensor(pictures))

    def save(self, folder: Path) -> None:
        """Write a diffusers folder; ``bdm convert --layout original`` makes a single file of it."""
        self.controlnet.save_pretrained(folder)


def _usable_picture(source: Source, index: int) -> Tensor:
    """(3, H, W) uint8 of example ``index``, or of the next one that can be used."""
    for i in range(len(source)):
        with suppress(UnreadableExample):
            pixels = source[(index + i) % len(source)].pixels
            assert pixels is not None
            return pixels
    raise UserError(f"none of {len(source)} validation pictures can be used; look at the data or its filters")


def edge_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Canny edges of N pictures as (N, 3, H, W) in [0, 1]."""
    return control_tensor([canny_edges(picture) for picture in pictures])
