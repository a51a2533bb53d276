"""Train what a configuration describes.

``python train.py CONFIG.yaml key=value ...`` (the same as ``bdm train``).
"""

import sys

from bdm.cli import console

if __name__ == "__main__":
    console(["train", *sys.argv[1:]])
