"""diffusers' own tests of its pipelines, with a bridge on their UNet."""

from peer.cases import STOCK
from peer.classes import classic, modern, with_reasons

SKIPPED: dict[str, str] = {}
FAILING: dict[str, str] = {}

for _name, _case in STOCK.items():
    globals()[f"Test{_name}"] = with_reasons(modern(_case), _name, SKIPPED, FAILING)
    globals()[f"TestClassic{_name}"] = with_reasons(classic(_case), _name, SKIPPED, FAILING)
