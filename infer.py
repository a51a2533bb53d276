"""Draw pictures: ``python infer.py PROMPT --out FILE`` (the same as ``bdm infer``)."""

import sys

from bdm.cli import console

if __name__ == "__main__":
    console(["infer", *sys.argv[1:]])
