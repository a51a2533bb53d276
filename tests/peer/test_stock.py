"""diffusers' own tests of its pipelines, with a bridge on their UNet."""

from peer.cases import STOCK
from peer.classes import classes

SKIPPED: dict[str, str] = {}
FAILING: dict[str, str] = {}

globals().update(classes(STOCK, SKIPPED, FAILING))
