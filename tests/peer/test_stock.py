"""diffusers' own tests of its pipelines, with a bridge on their UNet."""

from peer.cases import STOCK
from peer.classes import classes

SKIPPED: dict[str, str] = {}
FAILING: dict[str, str] = {
    "AnimateDiff.test_to_dtype": (
        "the pipeline makes a motion UNet of the UNet that it is given, which it does not cast; diffusers'"
        " own AnimateDiff tests look at the pipeline's parts for that reason"
    ),
}

globals().update(classes(STOCK, SKIPPED, FAILING))
