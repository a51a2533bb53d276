"""What an adapter does to one weight, whatever the factorisation.

Every form is brought to one: a function from a module's weight to the change. Forms and sources: LoRA (arXiv
2106.09685), LoHa (2108.06098), LoKr and the conventions of all of them (LyCORIS, 2309.14859), DoRA
(2402.09353), (IA)3 (2205.05638).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError, first_line


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
            axis = 1 if f.get("on_input", torch.zeros(())).item() else 0
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
        return rank(self.factors)

    @property
    def multiplier(self) -> float:
        """Factor of the product: alpha / rank, or what the file states elsewhere; else 1."""
        if "alpha" in self.factors and self.rank:
            return self.factors["alpha"].item() / self.rank
        return 1.0 if self.scale is None else self.scale


#: Factors of each form by the one that tells the form; bias, DoRA's magnitudes and what scales a product come
#: on top.
_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("diff",): ("diff", "alpha"),
    ("factor",): ("factor",),
    ("gain",): ("gain", "on_input"),
    ("up", "down"): ("up", "down", "mid"),
    ("w1_a", "w1_b", "w2_a", "w2_b"): ("w1_a", "w1_b", "w1_t", "w2_a", "w2_b", "w2_t"),
    ("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b"): ("k1", "k1_a", "k1_b", "k2", "k2_a", "k2_b", "k2_t"),
}
_ON_TOP = ("alpha", "scalar", "magnitude", "row_magnitude")


def refuse_unknown_form(factors: Mapping[str, Tensor], source: object) -> None:
    """Refuse factors that are not of one known form, or of which some would not be used.

    Raises:
        UserError: names them.
    """
    for name in ("alpha", "scalar", "on_input"):
        if name in factors and factors[name].numel() != 1:
            raise UserError(
                f"{source}: its {name} has shape {tuple(factors[name].shape)} and should be one number; the"
                " file is damaged, get it again"
            )
    given = factors.keys() - {"bias"}
    forms = [names for marks, names in _FORMS.items() if given & set(marks)]
    product = bool(given & {"up", "down", "w1_a", "w1_b", "k1", "k1_a", "k2", "k2_a"})
    left = given - set(forms[0] if forms else ()) - set(_ON_TOP if product else ())
    if left or len(forms) > 1:
        raise UserError(
            f"{source}: the factors {', '.join(sorted(given))} are of no known form together; the file is"
            " incomplete or of an unknown kind"
        )
    if "gain" in given and "on_input" not in given:
        raise UserError(
            f"{source} has a weight without on_input, which tells an (IA)3 from a layer's whole weight; the"
            " latter is not supported"
        )


def rank(factors: Mapping[str, Tensor]) -> int | None:
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
