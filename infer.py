"""Draw pictures: ``python infer.py PROMPT --out FILE`` (the same as ``bdm infer``)."""

import sys

from bdm.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
