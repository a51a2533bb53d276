"""What a command does before its work: which imports it waits for, and what it tells the collector."""

import gc
import subprocess
import sys
from pathlib import Path

from bdm.cli import heavy, main

ROOT = Path(__file__).parents[2]

HELP = """
import sys
from bdm.cli import build_parser, main
commands = [None, *build_parser()._subparsers._group_actions[0].choices]
for command in commands:
    try:
        main([*filter(None, [command]), "--help"])
    except SystemExit as exit:
        assert exit.code == 0
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
print(len(commands), file=sys.stderr)
"""

CONSOLE = """
import gc, sys
from bdm.cli import console
from bdm.cli.heavy import importing
try:
    console(["--help"])
except SystemExit as exit:
    assert exit.code == 0
with importing():
    assert not gc.isenabled()
    import fractions
assert gc.isenabled()
assert gc.get_freeze_count() > 0
"""


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_help_of_every_command_waits_for_nothing_heavy():
    assert int(python(HELP)) > 10


def test_a_process_of_its_own_does_not_collect_while_it_imports():
    python(CONSOLE)


def test_somebody_elses_process_is_left_alone(capsys):
    before = gc.get_freeze_count()
    with heavy.importing():
        assert gc.isenabled()
    assert main(["infer", "龙", "--steps", "0"]) == 2
    heavy.leave()
    assert gc.get_freeze_count() == before
    assert "must be at least 1" in capsys.readouterr().err
