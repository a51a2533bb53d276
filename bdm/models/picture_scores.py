"""What programs say of drawn pictures: how well they fit their texts, and how like they are to real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..extras import import_extra
from .caption_score import CaptionScorer

#: Pictures that are scored at once.
AT_ONCE = 32
#: Pictures of a subset by which KID is estimated, where there are so many.
SUBSET = 1000

#: torch-fidelity's names, and ours.
_DISTANCES = {"frechet_inception_distance": "fid", "kernel_inception_distance_mean": "kid"}

#: Figures that are better when they are smaller.
SMALLER_IS_BETTER = ("fid", "kid")


class PictureScores:
    """Scores pictures by the programs that were named.

    * ``clip_score``: the mean cosine of pictures and their texts, by a whole Chinese CLIP (arXiv 2211.01335).
    * ``fid`` (arXiv 1706.08500) and ``kid`` (arXiv 1801.01401) between drawn and real pictures, as
      torch-fidelity computes them of Inception's features.

    Args:
        scorer: folder of a whole Chinese CLIP; None for no ``clip_score``.
        features: file of Inception's weights in torch-fidelity's form; None for no ``fid`` and ``kid``.
        device: where they are computed.

    Raises:
        UserError: no such folder or file, or a package is missing.
    """

    def __init__(self, scorer: str | None, features: str | None, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._clip = CaptionScorer(scorer).to(self._device) if scorer else None
        self._features = features
        if features:
            if not Path(features).is_file():
                raise UserError(
                    f"features: {features} is no file; give torch-fidelity's weights of Inception (by default"
                    " it calls them weights-inception-2015-12-05-6726825d.pth)"
                )
            self._fidelity = import_extra("FID and KID")

    @torch.no_grad()
    def __call__(self, drawn: Tensor, texts: Sequence[str], real: Sequence[Tensor] = ()) -> dict[str, float]:
        """The figures of pictures.

        Args:
            drawn: (N, 3, H, W) uint8 in [0, 255].
            texts: of each picture.
            real: (3, H, W) uint8 pictures to compare with; without at least two there is no ``fid``.
        """
        figures = {}
        if self._clip is not None:
            figures["clip_score"] = self.cosines(drawn, texts).mean().item()
        if self._features and len(drawn) > 1 and len(real) > 1:
            figures |= self._distances(drawn, real)
        return figures

    @torch.no_grad()
    def cosines(self, drawn: Tensor, texts: Sequence[str]) -> Tensor:
        """(N,) cosines of pictures and their texts; NaN without a scorer."""
        if self._clip is None:
            return torch.full((len(drawn),), torch.nan)
        parts = range(0, len(drawn), AT_ONCE)
        return torch.cat([self._clip(drawn[i : i + AT_ONCE], texts[i : i + AT_ONCE]).cpu() for i in parts])

    def _distances(self, drawn: Tensor, real: Sequence[Tensor]) -> dict[str, float]:
        found: dict[str, Any] = self._fidelity.calculate_metrics(
            input1=_Pictures(drawn.cpu()),
            input2=_Pictures(real),
            cuda=self._device.type == "cuda",
            fid=True,
            kid=True,
            kid_subset_size=min(SUBSET, len(drawn), len(real)),
            feature_extractor_weights_path=self._features,
            batch_size=AT_ONCE,
            cache=False,
            save_cpu_ram=True,  # it reads with no process of its own then
            verbose=False,
        )
        return {own: float(found[theirs]) for theirs, own in _DISTANCES.items()}


class _Pictures(Dataset):
    """Pictures as torch-fidelity reads them; real ones may be of several sizes, so each comes alone."""

    def __init__(self, pictures: Tensor | Sequence[Tensor]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self._pictures[index]
