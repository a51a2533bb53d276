"""Runs one side of a comparison in this process and prints its peak memory.

``python -m bdm.bench.subprocess_main SIDE CONFIG-AS-JSON``
"""

from __future__ import annotations

import json
import sys

from .memory import peak_memory
from .run import bench_of


def main() -> None:
    """Build the side, run it once to warm up and once to be measured."""
    name, text = sys.argv[1:]
    settings = json.loads(text)
    side = bench_of(settings).side(name, count=False)
    side.seconds()
    print(json.dumps({"peak": peak_memory(side.seconds, settings["device"])}))


if __name__ == "__main__":
    main()
