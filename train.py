"""Train what a configuration describes.

``python train.py CONFIG.yaml key=value ...`` (the same as ``bdm train``).
"""

import sys

from bdm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
