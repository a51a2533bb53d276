"""What a recipe says of a batch: scalars, and means over some of its samples, as a (2,) sum and count."""

from __future__ import annotations

import torch
from torch import Tensor

#: Buckets of the timesteps whose errors are told apart.
BUCKETS = 4


def bucket_names(timesteps: int) -> list[str]:
    """Names of the buckets of so many timesteps: "t0-250" and so on."""
    width = timesteps // BUCKETS
    return [f"t{i * width}-{(i + 1) * width}" for i in range(BUCKETS)]


def by_timestep(errors: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """The (B,) errors of a batch by the bucket of their timesteps (B,), as sums and counts.

    Nothing waits for the device.
    """
    own = errors.detach().float()
    bucket = t.to(own.device) * BUCKETS // timesteps
    return {
        f"loss/{name}": torch.stack([torch.where(inside, own, 0).sum(), inside.sum().to(own)])
        for i, name in enumerate(bucket_names(timesteps))
        for inside in [bucket == i]
    }


def mean_of(term: Tensor) -> float:
    """A scalar, or the mean that a sum and a count make."""
    return term.item() if term.ndim == 0 else (term[0] / term[1]).item()
