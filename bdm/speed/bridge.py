"""The bridge with the savings of this room: what ``bdm.Bridge`` names."""

from __future__ import annotations

from ..method.branch import BranchModel
from ..method.bridge import Bridge as PaperBridge
from ..method.step import StepHelper
from .approximate import EXACT, Approximation, helpers_of
from .folding import FoldedEnlargements
from .sharing import KeptProjections, SharedRows


class Bridge(PaperBridge):
    """Runs the branch before every forward pass of a UNet and adds its residuals (see ``bdm.method.bridge``).

    Args:
        branch: the branch; bridges of several UNets may share one.
        share: do once what both halves of a guided step would do twice (see ``bdm.speed.sharing``); the picture
            is the same. False runs the paper's method and nothing else.
        approximation: work to leave out although the picture changes.
        same_latents: the pipeline stacks the same latents for both halves, by construction. Where nobody vouches
            for that, halves are compared on the CPU, and nothing is shared elsewhere.
        undisturbed: nobody's code runs between the steps, no callback and no hook; only then is anything kept
            from one step to the next.

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
        *,
        same_latents: bool = False,
        undisturbed: bool = False,
    ) -> None:
        # What leaves out half of a batch comes first: what is left cannot be shared.
        helpers = helpers_of(approximation)
        if share:
            helpers += exact_helpers(same_latents, undisturbed)
        super().__init__(branch, helpers)


def exact_helpers(same_latents: bool, undisturbed: bool) -> list[StepHelper]:
    """All savings that leave the picture as it is.

    Args:
        same_latents: both halves of a guided step are given the same latents.
        undisturbed: nobody's code runs between the steps: what a step kept holds in the next.
    """
    shared = SharedRows(same_latents, undisturbed)
    return [shared, KeptProjections(), FoldedEnlargements()] if undisturbed else [shared]
