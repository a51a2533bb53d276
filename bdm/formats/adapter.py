"""Adapters (the LoRA family): what a file adds to a weight, whatever its key names and factorisation.

An adapter's file holds, for some modules of the UNet and of CLIP's text encoder, the factors of a change of
their weight. Every form is brought to one: a function from a module's weight to the change. Forms and
sources: LoRA (arXiv 2106.09685), LoHa (2108.06098), LoKr and the conventions of all of them (LyCORIS,
2309.14859), DoRA (2402.09353), (IA)3 (2205.05638).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, first_line
from .names import UNetBuild, flat
from .peft_settings import PeftSettings
from .weights import WeightFile

#: Endings of keys and what they are called here. kohya/LyCORIS, peft and diffusers name the same factors
#: differently.
_FACTORS = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora.up.weight": "up",
    "lora.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "row_magnitude",
    "lora_magnitude_vector.weight": "row_magnitude",
    "lora_magnitude_vector.default.weight": "row_magnitude",
    "hada_w1_a": "w1_a",
    "hada_w1_b": "w1_b",
    "hada_w2_a": "w2_a",
    "hada_w2_b": "w2_b",
    "hada_t1": "w1_t",
    "hada_t2": "w2_t",
    "lokr_w1": "k1",
    "lokr_w1_a": "k1_a",
    "lokr_w1_b": "k1_b",
    "lokr_w2": "k2",
    "lokr_w2_a": "k2_a",
    "lokr_w2_b": "k2_b",
    "lokr_t2": "k2_t",
    "weight": "gain",
    "on_input": "on_input",
    "ia3_l": "factor",
    "diff": "diff",
    "diff_b": "bias",
    "w_norm": "diff",
    "b_norm": "bias",
    "scalar": "scalar",
}
#: The endings that kohya and LyCORIS write: of each factor, the first.
KOHYA_ENDINGS = {ours: theirs for theirs, ours in reversed(_FACTORS.items())}
_ENDINGS = re.compile(
    r"^(?P<module>.+?)[._](?P<factor>"
    + "|".join(map(re.escape, sorted(_FACTORS, key=len, reverse=True)))
    + r")$"
)
#: The diffusers attention processors of 2023 carry the projection's name:
#: "attn1.processor.to_q_lora.up.weight".
_PROCESSOR = re.compile(
    r"^(?P<block>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<factor>up|down)\.weight$"
)
#: ... and for the text encoder "self_attn.to_q_lora.up.weight".
_TEXT_PROCESSOR = re.compile(
    r"^(?P<block>.+\.self_attn)\.to_(?P<projection>q|k|v|out)_lora\.(?P<factor>up|down)\.weight$"
)
#: What stands before module names, by part; flattened, longest first.
_PREFIXES = {
    "unet": (
        "lora_unet_",
        "lycoris_unet_",
        "base_model_model_unet_",
        "diffusion_model_",
        "unet_",
        "lycoris_",
        "base_model_model_",
        "",
    ),
    "text_encoder": (
        "base_model_model_text_model_",
        "lora_te_text_model_",
        "lora_te1_text_model_",
        "lycoris_te_text_model_",
        "clip_l_text_model_",
        "text_encoder_text_model_",
        "lycoris_text_model_",
        "lora_te_",
        "text_encoder_",
    ),
}


@dataclass(frozen=True)
class Change:
    """The factors that change one module's weight (and bias).

    Attributes:
        factors: tensors by the names of ``_FACTORS``.
        scale: of the low-rank product where the file states it elsewhere than in ``alpha`` (peft).
    """

    factors: dict[str, Tensor]
    scale: float | None = None

    def weight(self, weight: Tensor) -> Tensor:
        """The change of a module's (out, in, ...) weight at strength 1, in float32.

        Raises:
            UserError: factors that do not fit the weight or each other.
        """
        factors = {name: tensor.to(weight.device, torch.float32) for name, tensor in self.factors.items()}
        weight = weight.float()
        try:
            change = self._change(factors, weight)
            if "row_magnitude" in factors:  # peft: always over outputs, whatever the shape it is kept in
                change = _renormalise(weight + change, factors["row_magnitude"].flatten()[:, None]) - weight
            elif "magnitude" in factors:
                change = _renormalise(weight + change, factors["magnitude"]) - weight
            return change
        except KeyError as error:
            raise UserError(
                f"factors {', '.join(self.factors)} do not fit a weight: {error} is missing; the file is"
                " incomplete"
            ) from None
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.factors.items() if t.ndim)
            raise UserError(
                f"factors {shapes} do not fit a weight of shape {tuple(weight.shape)} ({first_line(error)}); "
                "the adapter was made for another base model"
            ) from None

    @property
    def reaches_bias(self) -> bool:
        """Whether a module's bias, if it has one, changes too: peft's (IA)3 scales whole outputs."""
        return "bias" in self.factors or (
            "factor" in self.factors and self.factors["factor"].shape[1:] == (1,)
        )

    def bias(self, bias: Tensor) -> Tensor:
        """The change of a module's bias at strength 1, in float32.

        Raises:
            UserError: another shape.
        """
        if "bias" not in self.factors and self.factors["factor"].shape == (len(bias), 1):
            return bias.float() * (self.factors["factor"].to(bias.device, torch.float32).flatten() - 1)
        change = self.factors.get("bias", self.factors.get("factor", bias))
        if change.shape != bias.shape:
            raise UserError(
                f"a bias change of shape {tuple(change.shape)} does not fit a bias of shape"
                f" {tuple(bias.shape)}; the adapter was made for another base model"
            )
        return change.to(bias.device, torch.float32)

    def _change(self, f: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The change before DoRA's renormalisation."""
        if "diff" in f:
            _require(f["diff"].shape[:1] == weight.shape[:1], "outputs")
            return f["diff"].reshape(weight.shape)
        if "factor" in f:  # (IA)3 as peft writes it: a factor, 1 being neutral
            return weight * (_along(f["factor"], weight) - 1)
        if "gain" in f:  # (IA)3 as LyCORIS writes it: 0 is neutral
            on_input = bool(f["on_input"]) if "on_input" in f else False
            axis = 1 if on_input else 0
            return weight * f["gain"].reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        if "down" in f:
            _require((f["up"].shape[0], _inputs(f)) == _size(weight), "outputs or inputs")
            product = _low_rank(f)
        elif "w1_a" in f:
            _require(_half_size(f, "w1") == _half_size(f, "w2") == _size(weight), "outputs or inputs")
            product = _half(f, "w1") * _half(f, "w2")
        else:
            product = _kronecker(f, weight)
        return product.reshape(weight.shape) * (
            self.multiplier * (f["scalar"].item() if "scalar" in f else 1.0)
        )

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None without a factorised half, where LyCORIS ignores alpha."""
        return _rank(self.factors)

    @property
    def multiplier(self) -> float:
        """Factor of the product: alpha / rank, or what the file states elsewhere; else 1."""
        if "alpha" in self.factors and self.rank:
            return self.factors["alpha"].item() / self.rank
        return 1.0 if self.scale is None else self.scale


def _rank(factors: Mapping[str, Tensor]) -> int | None:
    """The rank of a low-rank product; None where no matrix is factorised."""
    return next(
        (
            factors[name].shape[0]
            for name in ("down", "w1_b", "k1_b", "k2_b")
            if name in factors and factors[name].ndim
        ),
        None,
    )


def _require(fits: bool, what: str) -> None:
    """Before anything is multiplied: a product of factors that do not fit may be of any size."""
    if not fits:
        raise ValueError(f"other {what}")


def _size(matrix: Tensor) -> tuple[int, int]:
    """Outputs and inputs, counting a convolution's window as inputs."""
    return matrix.shape[0], matrix.flatten(1).shape[1]


def _inputs(f: Mapping[str, Tensor]) -> int:
    """Inputs of a low-rank product, counting a convolution's window."""
    return f["down"].flatten(1).shape[1] * (f["mid"][0, 0].numel() if "mid" in f else 1)


def _low_rank(f: Mapping[str, Tensor]) -> Tensor:
    """up @ down; with a middle factor the Tucker form of a convolution."""
    up, down = f["up"].flatten(1), f["down"].flatten(1)
    return _tucker(f["mid"], up.T, down) if "mid" in f else up @ down


def _half(f: Mapping[str, Tensor], name: str) -> Tensor:
    """One of the two matrices of LoHa (w1, w2) and LoKr (k1, k2).

    As it is, as a product, or as a Tucker form.
    """
    if name in f:
        return f[name]
    a, b = f[f"{name}_a"], f[f"{name}_b"]
    return _tucker(f[f"{name}_t"], a, b) if f"{name}_t" in f else a @ b.flatten(1)


def _half_size(f: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The size that ``_half`` will have."""
    if name in f:
        return _size(f[name])
    a, b = f[f"{name}_a"], f[f"{name}_b"]
    if f"{name}_t" in f:
        return a.shape[1], b.shape[1] * f[f"{name}_t"][0, 0].numel()
    return a.shape[0], b.flatten(1).shape[1]


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(m, n, ...), (m, out), (n, in) -> (out, in, ...)."""
    # What lies between the two products is (out, n, ...): a rank beyond all use would make it larger than the
    # file.
    _require(core.shape[1] <= max(1024, 4 * up.shape[1], 4 * down.shape[1]), "rank")
    return torch.einsum("mn...,mo,ni->oi...", core, up, down)


def _kronecker(f: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The Kronecker product of two matrices, either of which may be a product itself."""
    (out_1, in_1), (out_2, in_2) = _half_size(f, "k1"), _half_size(f, "k2")
    _require((out_1 * out_2, in_1 * in_2) == _size(weight), "outputs or inputs")
    left, right = _half(f, "k1"), _half(f, "k2")
    if right.ndim == 2 and weight.ndim == 4:
        right = right.reshape(*right.shape[:1], -1, *weight.shape[2:])
    return torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - left.ndim)), right)


def _along(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector over outputs, shape (out, 1), or over inputs, shape (1, in), spread over a weight."""
    axis = 0 if vector.shape[0] == weight.shape[0] and vector[0].numel() == 1 else 1
    return vector.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def _renormalise(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: every row (or, in older LyCORIS files, every input column) of the changed weight gets its learned
    length.
    """
    axis = 0 if magnitude.shape[0] == weight.shape[0] and magnitude[0].numel() == 1 else 1
    others = [i for i in range(weight.ndim) if i != axis]
    length = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (magnitude.reshape(length.shape) / length)


def split_adapter(file: WeightFile, modules: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Change]]:
    """Assign an adapter's keys to modules.

    Args:
        file: the adapter's weights.
        modules: names of the modules with weights, by part ("unet", "text_encoder"), as diffusers names them.

    Returns:
        By part, the change of each module.

    Raises:
        UserError: keys that belong to no module.
    """
    lookup = {part: _lookup(names, part) for part, names in modules.items()}
    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in modules}
    unknown = []
    for key, tensor in file.tensors.items():
        if key.startswith("bundle_emb."):  # embeddings that some trainers pack beside the adapter
            continue
        module, factor = split_key(key)
        place = _place(module, lookup) if module else None
        if place is None:
            unknown.append(key)
        else:
            part, name = place
            found[part].setdefault(name, {})[factor] = tensor
    if unknown:
        raise UserError(
            f"{file.path}: {len(unknown)} of {len(file.tensors)} keys match no module of this model, such as"
            f" {', '.join(unknown[:3])}; the file is made for another base or of an unknown kind (see `bdm"
            " inspect`)"
        )
    settings = PeftSettings.of(file)
    return {
        # Factors are small and are used again whenever a strength changes: not as views of a file that may be
        # rewritten.
        part: {
            name: Change(
                {key: t.clone() for key, t in factors.items()}, settings.scale(part, name, _rank(factors))
            )
            for name, factors in changes.items()
        }
        for part, changes in found.items()
    }


def split_key(key: str) -> tuple[str, str]:
    """(module, factor) of an adapter's key; both "" if it is not one."""
    processor = _PROCESSOR.match(key)
    if processor:
        projection = processor["projection"].replace("to_out", "to_out.0")
        return f"{processor['block']}.{projection}", processor["factor"]
    processor = _TEXT_PROCESSOR.match(key)
    if processor:
        return f"{processor['block']}.{processor['projection']}_proj", processor["factor"]
    ending = _ENDINGS.match(key)
    return (ending["module"], _FACTORS[ending["factor"]]) if ending else ("", "")


def _lookup(names: Iterable[str], part: str) -> dict[str, str]:
    """Flattened module names -> module names, under the original layout's names too."""
    names = list(names)
    table = {flat(name): name for name in names}
    if part == "unet":
        pairs = UNetBuild.of([f"{name}.weight" for name in names]).unet()
        for ours, theirs in pairs:
            inside = [name for name in names if name == theirs or name.startswith(f"{theirs}.")]
            table |= {flat(ours + name[len(theirs) :]): name for name in inside}
    return table


def _place(module: str, lookup: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    name = flat(module)
    for part, table in lookup.items():
        for prefix in _PREFIXES[part]:
            if name.startswith(prefix) and name[len(prefix) :] in table:
                return part, table[name[len(prefix) :]]
    return None


def adapter_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """What trainers note in an adapter's header, under names of ours: base, rank, alpha, trigger words."""
    noted = {
        "base": "ss_base_model_version",
        "rank": "ss_network_dim",
        "alpha": "ss_network_alpha",
        "title": "modelspec.title",
    }
    facts = {ours: metadata[theirs] for ours, theirs in noted.items() if metadata.get(theirs)}
    words = metadata.get("modelspec.trigger_phrase", "")
    if not words and metadata.get("ss_tag_frequency"):
        try:
            tags = json.loads(metadata["ss_tag_frequency"])
            counts: dict[str, int] = {}
            for folder in tags.values():
                for tag, count in folder.items():
                    counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
            words = ", ".join(sorted(counts, key=lambda tag: -counts[tag])[:5])
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            words = ""
    return facts | ({"trigger words": words} if words else {})
