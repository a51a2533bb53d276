"""Connectors that GlueGen, MuLan and ELLA released: features of another text encoder -> what SD1.5 reads.

GlueGen: Qin et al. (arXiv 2303.10056); MuLan: Lai et al. (arXiv 2412.01271); ELLA: Hu et al. (arXiv
2403.05135). Their files hold the connector alone. The text encoder that it was trained for, and how its texts
are cut, are the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..formats.connectors import ConnectorSystem, connector_system
from ..formats.names import largest_block
from ..formats.weights import read_tensors, refuse_not_finite

#: Width of the text features that SD1.5 reads.
SD15_WIDTH = 768
#: Heads of MuLan's and ELLA's attention, which no weight tells.
_HEADS = 8


class MulanConnector(nn.Module):
    """Features are projected and read by learned queries, through a transformer of both halves.

    Args:
        width_in: of the features (InternVL's text encoder: 4096).
        width: of what the UNet reads.
        queries: tokens that come out (77 or 120).
        layers: of encoder and decoder.
    """

    def __init__(self, width_in: int, width: int, queries: int, layers: tuple[int, int]) -> None:
        super().__init__()
        shape: Any = dict(
            nhead=_HEADS, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.proj = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))
        self.queries = nn.Parameter(torch.zeros(1, queries, width))
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, **shape), layers[0], nn.LayerNorm(width), False
        )
        self.transformer = nn.Transformer(
            width, num_decoder_layers=layers[1], custom_encoder=encoder, **shape
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, L, width_in) -> (B, queries, width)."""
        return self.transformer(self.proj(features), self.queries.expand(len(features), -1, -1))


class _GlueBlock(nn.Module):
    """A network over the channels of each token, then one over the tokens of each channel."""

    def __init__(self, tokens: int, width: int, width_out: int, normed: bool) -> None:
        super().__init__()
        self.net_tok = _three_layers(tokens, tokens, normed)
        self.net_sen = _three_layers(width, width_out, normed)
        self.residual = width == width_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width_out)."""
        x = self.net_sen(x) + x if self.residual else self.net_sen(x)
        x = x.transpose(1, 2)
        x = self.net_tok(x) + x if self.residual else self.net_tok(x)
        return x.transpose(1, 2)


def _three_layers(width: int, width_out: int, normed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for start, end in ((width, 2 * width), (2 * width, 2 * width), (2 * width, width_out)):
        layers += [nn.GELU()] * bool(layers)
        layers += [nn.Linear(start, end), *([nn.LayerNorm(end)] if normed else [])]
    return nn.Sequential(*layers)


class GlueConnector(nn.Module):
    """A stack of blocks that mix channels and tokens; the features are brought to CLIP's lengths behind it.

    Args:
        tokens: of a text; neither more nor fewer are read (77).
        width_in: of the features (XLM-R large: 1024).
        width: of what the UNet reads.
        depth: blocks before the last.
        normed: whether the last block normalises too.
        norms: (tokens, 1) lengths that features of CLIP have at each position, which the file does not hold.
    """

    def __init__(
        self, tokens: int, width_in: int, width: int, depth: int, normed: bool, norms: Tensor
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_GlueBlock(tokens, width_in, width_in, True) for _ in range(depth))
        self.tail = _GlueBlock(tokens, width_in, width, normed)
        self.register_buffer("norms", norms.reshape(tokens, 1).clone(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, tokens, width_in) -> (B, tokens, width)."""
        x = features / 3
        for block in self.blocks:
            x = nn.functional.gelu(block(x) + x)
        return self.tail(x) * (self.get_buffer("norms") / 2)


class _TimedNorm(nn.Module):
    """A normalisation whose shift and scale depend on the time."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.linear(nn.functional.silu(time))[:, None].chunk(2, dim=-1)
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class _PerceiverBlock(nn.Module):
    """Latents read the features and themselves."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_1, self.ln_2, self.ln_ff = (_TimedNorm(width, time_width) for _ in range(3))

    def forward(self, x: Tensor, latents: Tensor, time: Tensor) -> Tensor:
        query = self.ln_1(latents, time)
        read = torch.cat([query, self.ln_2(x, time)], dim=1)
        latents = latents + self.attn(query, read, read, need_weights=False)[0]
        inner = nn.functional.relu(self.mlp["c_fc"](self.ln_ff(latents, time))).square()
        return latents + self.mlp["c_proj"](inner)


class _Resampler(nn.Module):
    def __init__(self, width_in: int, width: int, latents: int, layers: int, time_width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.time_aware_linear = nn.Linear(time_width, width)
        self.proj_in = nn.Linear(width_in, width)
        self.perceiver_blocks = nn.ModuleList(_PerceiverBlock(width, time_width) for _ in range(layers))

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        latents = self.latents[None] + self.time_aware_linear(nn.functional.silu(time))[:, None]
        x = self.proj_in(features)
        for block in self.perceiver_blocks:
            latents = block(x, latents, time)
        return latents


class EllaConnector(nn.Module):
    """Learned latents read the features anew in every step, told how much noise is left.

    Args:
        width_in: of the features (Flan-T5 XL: 2048).
        width: of what the UNet reads.
        latents: tokens that come out (64).
        layers: of the resampler.
        channels: of the sinusoids of a time.
        time_width: of what is made of them.
    """

    def __init__(
        self, width_in: int, width: int, latents: int, layers: int, channels: int, time_width: int
    ) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        self.position = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels, time_width)
        self.connector = _Resampler(width_in, width, latents, layers, time_width)

    def forward(self, features: Tensor, timesteps: Tensor) -> Tensor:
        """(B, L, width_in) features and (B,) or one timestep -> (B, latents, width)."""
        waves = self.position(timesteps.reshape(-1)).to(features)
        return self.connector(features, self.time_embedding(waves.expand(len(features), -1)))

    def attach(self, unet: nn.Module) -> Any:
        """Have a UNet read the features that it is given through this connector, step by step.

        Returns:
            A handle; its ``remove()`` takes the connector off.
        """

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            sample, timestep, text, *rest = (*args, *_later(kwargs, len(args)))
            times = torch.as_tensor(timestep, device=text.device)
            return (sample, timestep, self(text, times), *rest), _without_first(kwargs)

        return unet.register_forward_pre_hook(read, with_kwargs=True, prepend=True)


_FIRST = ("sample", "timestep", "encoder_hidden_states")


def _later(kwargs: Mapping[str, Any], given: int) -> list[Any]:
    return [kwargs[name] for name in _FIRST[given:]]


def _without_first(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _FIRST}


def load_released_connector(
    path: str | Path, width: int = SD15_WIDTH, norms: Tensor | None = None
) -> MulanConnector | GlueConnector | EllaConnector:
    """The connector in a file of MuLan's, GlueGen's or ELLA's, in float32 and evaluation mode.

    Its output is what ``prompt_embeds`` of a pipeline without a branch takes; ELLA's reads in every step (see
    ``EllaConnector.attach``).

    Args:
        path: the file.
        width: of what the UNet reads.
        norms: GlueGen's lengths of CLIP's features (see ``GlueConnector``), which its page lists.

    Raises:
        UserError: another file, one for a UNet of another width (SD2.1's, SDXL's), damaged weights, or
            GlueGen's without lengths.
    """
    tensors = read_tensors(path)
    system = connector_system(tensors)
    if system is None:
        raise UserError(f"{path} holds no connector of MuLan, GlueGen or ELLA; give the file of one of them")
    refuse_not_finite(tensors, Path(path))
    try:
        with torch.device("meta"):
            connector = _outline(system, tensors, norms, path)
        shapes = {name: tensor.shape for name, tensor in connector.state_dict().items()}
    except UserError:
        raise
    except (KeyError, ValueError, IndexError, AssertionError):
        shapes, connector = {}, None
    if connector is None or shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(f"{path}: its weights are not those of {system}'s connector; get the file again")
    out = _width(system, tensors)
    if out != width:
        raise UserError(
            f"{path} is {system}'s connector for a UNet that reads features {out} wide, and this one reads"
            f" {width}; give the one that was released for SD1.5"
        )
    built = _outline(system, tensors, norms, path).float()
    built.load_state_dict(tensors)
    return built.eval().requires_grad_(False)


def _width(system: ConnectorSystem, tensors: Mapping[str, Tensor]) -> int:
    if system == "GlueGen":
        last = f"tail.net_sen.{6 if 'tail.net_sen.6.weight' in tensors else 4}.weight"
        return tensors[last].shape[0]
    return tensors["queries" if system == "MuLan" else "connector.latents"].shape[-1]


def _outline(
    system: ConnectorSystem, tensors: Mapping[str, Tensor], norms: Tensor | None, path: str | Path
) -> Any:
    """A connector of the sizes that a file's weights have."""
    width = _width(system, tensors)
    if system == "MuLan":
        layers = tuple(
            1 + largest_block(rf"transformer\.{half}\.layers\.(\d+)\.", tensors)
            for half in ("encoder", "decoder")
        )
        return MulanConnector(tensors["proj.0.weight"].shape[1], width, tensors["queries"].shape[1], layers)  # pyright: ignore
    if system == "ELLA":
        time_width, channels = tensors["time_embedding.linear_1.weight"].shape
        latents, blocks = tensors["connector.latents"].shape[0], r"connector\.perceiver_blocks\.(\d+)\."
        return EllaConnector(
            tensors["connector.proj_in.weight"].shape[1], width, latents,
            1 + largest_block(blocks, tensors), channels, time_width,
        )  # fmt: skip
    tokens, width_in = (tensors[f"tail.net_{part}.0.weight"].shape[1] for part in ("tok", "sen"))
    if norms is None or norms.numel() != tokens:
        raise UserError(
            f"{path} is GlueGen's connector, which needs the lengths of CLIP's features at {tokens} positions"
            " beside it; give norms=, as GlueGen's page lists them"
        )
    depth = 1 + largest_block(r"blocks\.(\d+)\.", tensors)
    normed = "tail.net_sen.6.weight" in tensors
    return GlueConnector(tokens, width_in, width, depth, normed, norms.float())
