"""Work that a guided step of a bilingual model would do twice, done once; the picture stays the same.

A guided pipeline stacks its batch as [negative, positive] over the same latents. Where both halves of a row
also have the same English condition (always with "" and ""), the backbone's input, encoder and middle block
see equal rows: they run on the distinct ones, and their results are repeated for the decoder, where the
branch makes the halves differ. Of the branch, whose halves do differ in text, the part before the first
cross-attention is shared in the same way. Keys and values of cross-attentions depend on the text alone and
are kept from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

HOOK_NAME = "bdm.speed.sharing"
#: Ends of the names of layers that read nothing but the text.
TEXT_PROJECTIONS = (".attn2.to_k", ".attn2.to_v")


class RowPlan:
    """Which rows of the current batch are distinct.

    Attributes:
        batch: rows of the whole batch.
        rows: indices of the distinct rows, or None where all are distinct.
        back: for every row, the position of its equal among the distinct ones.
    """

    def __init__(self) -> None:
        self.batch = 0
        self.rows: Tensor | None = None
        self.back: Tensor | None = None
        self._text: tuple[Tensor, list[int], Tensor] | None = None

    def clear(self) -> None:
        """All rows are distinct."""
        self.batch, self.rows, self.back = 0, None, None

    def positive_half(self, latents: Tensor, text: Tensor) -> None:
        """Only the second half of a guided batch is computed, and stands for both.

        Args:
            latents: (2N, C, h, w).
            text: (2N, L, D).
        """
        half = len(latents) // 2
        self._choose(2 * half, [*range(half, 2 * half)], [*range(half)] * 2, text)

    def find(self, latents: Tensor, text: Tensor | None = None) -> None:
        """Compare the halves of a guided batch row by row.

        Args:
            latents: (2N, C, h, w).
            text: (2N, L, D), if the modules read it.
        """
        self.clear()
        half = latents.shape[0] // 2
        equal = torch.ones(half, dtype=torch.bool, device=latents.device)
        for value in (latents, text):
            if value is not None:
                equal &= (value[:half] == value[half:]).flatten(1).all(1)
        own = [i for i, same in enumerate(equal.tolist()) if not same]
        if len(own) == half:
            return
        place = {i: half + n for n, i in enumerate(own)}
        rows = [*range(half), *(half + i for i in own)]
        self._choose(
            2 * half, rows, [*range(half), *(place.get(i, i) for i in range(half))], text, latents.device
        )

    def _choose(
        self, batch: int, rows: list[int], back: list[int], text: Tensor | None, device: Any = None
    ) -> None:
        device = text.device if text is not None else device
        self.batch, self.rows, self.back = (
            batch,
            torch.tensor(rows, device=device),
            torch.tensor(back, device=device),
        )
        if text is not None and (self._text is None or self._text[0] is not text or self._text[1] != rows):
            # One selected tensor for all steps, so that what is kept for it stays valid.
            self._text = (text, rows, text.index_select(0, self.rows))

    def select(self, value: Tensor) -> Tensor:
        """The distinct rows of something that has the batch first; anything else as it is."""
        if self.rows is None or not value.ndim or value.shape[0] != self.batch:
            return value
        if self._text is not None and value is self._text[0]:
            return self._text[2]
        return value.index_select(0, self.rows)

    def spread(self, value: Tensor) -> Tensor:
        """Every row's result, from the distinct rows' ones."""
        if self.rows is None or self.back is None or not value.ndim or value.shape[0] != len(self.rows):
            return value
        return value.index_select(0, self.back)


class DistinctRows(ModelHook):
    """Runs a module on the distinct rows of its inputs and repeats its outputs."""

    def __init__(self, plan: RowPlan) -> None:
        super().__init__()
        self.plan = plan

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Keep the distinct rows of everything that has the batch first."""
        return (args, kwargs) if self.plan.rows is None else each_tensor(self.plan.select, (args, kwargs))

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Give every row its result."""
        return output if self.plan.rows is None else each_tensor(self.plan.spread, output)


class Snapshot:
    """Tells whether tensors still have the memory they had, with nothing written to it since.

    Not every change of a weight counts up its version: plug-ins give it other memory. So the memory is held
        here, and no other
    weight can come to lie at its address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._memory = [t.untyped_storage() for t in tensors]
        self._state = self._read(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        return self._read(tensors) == self._state

    @staticmethod
    def _read(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors]


class KeptProjection(ModelHook):
    """Keeps a key or value projection for as long as it is given the very same text features."""

    def __init__(self) -> None:
        super().__init__()
        self._given: Tensor | None = None
        self._snapshot: Snapshot | None = None
        self._kept: Tensor | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The kept result if features and weights are those of the last call and nobody has changed them in
        place.
        """
        features = args[0]
        project: Any = self.fn_ref.original_forward
        tensors = (features, *module.parameters())
        if any(
            t.is_inference() for t in tensors
        ):  # these have no version that would tell of a change in place
            return project(*args, **kwargs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return project(*args, **kwargs)
        if self._given is not features or self._snapshot is None or not self._snapshot.holds(tensors):
            self._given, self._snapshot = features, Snapshot(tensors)
            self._kept = project(*args, **kwargs)
        return self._kept


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``change`` to the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(change, item) for item in value)
    if isinstance(value, dict):
        return type(value)(**{key: each_tensor(change, item) for key, item in value.items()})
    return value


class SharedWork:
    """Puts the hooks on a backbone and its branch, and takes them off."""

    def __init__(self) -> None:
        self.encoder, self.prefix = RowPlan(), RowPlan()
        self._hooked: list[nn.Module] = []

    def attach(self, unet: Any, branch: Any) -> None:
        """Hook the backbone's encoder, the branch's text-free beginning, and the text projections of both."""
        for module in (unet.conv_in, *unet.down_blocks, unet.mid_block):
            self._hook(module, DistinctRows(self.encoder))
        for module in (branch.conv_in, branch.down_blocks[0].resnets[0]):
            self._hook(module, DistinctRows(self.prefix))
        for network in (unet, branch):
            for name, module in network.named_modules():
                if name.endswith(TEXT_PROJECTIONS):
                    self._hook(module, KeptProjection())

    def detach(self) -> None:
        """Take all hooks off."""
        for module in self._hooked:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK_NAME, recurse=False)
        self._hooked.clear()

    def _hook(self, module: nn.Module, hook: ModelHook) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
        self._hooked.append(module)
