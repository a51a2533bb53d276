"""The bridge with the savings of this room: what ``bdm.Bridge`` names."""

from __future__ import annotations

from collections.abc import Sequence

from ..method.branch import BranchModel
from ..method.bridge import Bridge as PaperBridge
from ..method.composed import ComposedGuidance
from ..method.step import StepHelper
from .approximate import EXACT, Approximation, helpers_of
from .folding import FoldedEnlargements
from .sharing import UNKNOWN, KeptProjections, SharedRows, Vouched


class Bridge(PaperBridge):
    """Runs the branch before every forward pass of a UNet and adds its residuals (see ``bdm.method.bridge``).

    Args:
        branch: the branch; bridges of several UNets may share one.
        share: do once what both halves of a guided step would do twice (see ``bdm.speed.sharing``); the
            picture is the same. False runs the paper's method and nothing else.
        approximation: work to leave out although the picture changes.
        vouched: what the pipeline that draws vouches for.
        composed: separate strengths of the two languages; None has the paper's one.
        beside: further branches (see ``bdm.method.bridge.Bridge``).

    Example:
        >>> bridge = bdm.Bridge(branch).attach(pipe.unet)
        >>> with bridge.condition(bdm.NativeCondition(native.encode(["红灯笼"]), native.encode([""]))):
        ...     picture = pipe("").images[0]
        >>> bridge.detach()
    """

    def __init__(
        self,
        branch: BranchModel,
        share: bool = True,
        approximation: Approximation = EXACT,
        vouched: Vouched = UNKNOWN,
        composed: ComposedGuidance | None = None,
        beside: Sequence[BranchModel] = (),
    ) -> None:
        # What changes the parts of a batch comes first: what is shared is seen in the parts that are left.
        helpers = helpers_of(approximation, composed)
        if share:
            helpers += exact_helpers(vouched)
        super().__init__(branch, helpers, beside)


def exact_helpers(vouched: Vouched) -> list[StepHelper]:
    """All savings that leave the picture as it is."""
    shared = SharedRows(vouched)
    return [shared, KeptProjections(), FoldedEnlargements()] if vouched.undisturbed else [shared]
