"""``python -m bdm`` is the ``bdm`` command."""

from .cli import console

if __name__ == "__main__":
    raise SystemExit(console())
