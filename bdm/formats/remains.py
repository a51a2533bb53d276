"""What files hold beside the weights that are read of them: known to be harmless, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from .signs import MARKERS

if TYPE_CHECKING:
    from torch import Tensor

#: Beside a checkpoint's parts: the noise schedule (alphas_cumprod and betas are compared with SD1.5's in
#: ``bdm.formats.signs``, the others follow from them), counters of its training, and markers of signs.
_BESIDE_PARTS = (
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "logvar",
    "lvlb_weights", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "posterior_variance", "scale_factor", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "global_step", "epoch", *MARKERS,
)  # fmt: skip
#: The average of the weights, which is read where there is nothing else.
_AVERAGE = ("model_ema.",)

#: Beside the weights of CLIP's text encoder: tables of numbers from 0 to 76, and what a whole CLIP has.
_BESIDE_TEXT = re.compile(
    r"^(?:.*\.)?(?:position_ids|logit_scale|text_projection(?:\.weight)?|visual_projection\.weight)$"
    r"|^(?:vision_model|visual)\."
)


def refuse_unknown(
    keys: Iterable[str], prefixes: Sequence[str], source: object, known: Sequence[str] = _BESIDE_PARTS
) -> None:
    """Refuse a file that holds what is neither read nor known to be harmless.

    Args:
        keys: of all its tensors.
        prefixes: of the parts that are read.
        source: for messages.
        known: names that may be there besides.

    Raises:
        UserError: names the first one.
    """
    starts = (*prefixes, *_AVERAGE)
    left = [key for key in keys if key not in known and not key.startswith(starts)]
    if left:
        raise UserError(
            f"{source} holds {printable(left[0], 120)!r}{_others(left)}, and what that means is not known"
            " here; reading the rest without it might draw something else than the file is for: give a file"
            " without it"
        )


def without_text_remains(tensors: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    """The weights of CLIP's text encoder, without what may lie beside them.

    Args:
        tensors: by name, without ``text_model.``.
        parts: beginnings of the names of weights.

    Raises:
        UserError: a name that is neither.
    """
    kept = {key: tensor for key, tensor in tensors.items() if not _BESIDE_TEXT.match(key)}
    left = [key for key in kept if not key.startswith(tuple(parts))]
    if left:
        raise UserError(
            f"the text encoder holds {printable(left[0], 120)!r}{_others(left)}, which CLIP's has not; this"
            " is no SD1.5 model"
        )
    return kept


def _others(left: Sequence[str]) -> str:
    return f" and {len(left) - 1} more of the kind" if len(left) > 1 else ""
