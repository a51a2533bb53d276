"""Every command and every option on the pages, in the configurations and in --help is a real one."""

import argparse
import re
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from pages import CONFIGS, PAGES, ROOT, blocks, commands, header, header_commands, inline_commands, paths
from pydantic import BaseModel
from torch.distributed.run import get_args_parser

from bdm import cli, config
from bdm.config import (
    BENCHES,
    BenchGpuConfig,
    IndexConfig,
    PrepareConfig,
    RunConfig,
    ShipConfig,
    VocabularyConfig,
    read_config,
    read_evaluation,
)
from bdm.drawing.other_names import our_option
from bdm.errors import UserError

#: Words that stand for what a reader puts in: FILE, CONFIG.yaml, HOST_OF_RANK_0.
PLACEHOLDER = re.compile(r"^[A-Z][A-Z_0-9]+(\.yaml)?$")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def check(words):
    """Refuse a command that its program would refuse, as far as that shows without running it."""
    match words:
        case ["source" | "git" | "cd", *_] | ["python" | ".venv/bin/python", "-m", "sphinx", *_]:
            pass
        case [setting, *rest] if re.match(r"[A-Z_]+=", setting):  # of the environment
            check(rest)
        case ["make", *targets]:
            assert {target for target in targets if "=" not in target} <= set(TARGETS), targets
        case ["pip", "install", *packages]:
            check_extras(packages)
        case ["accelerate", "launch", *rest]:
            options, unknown = launch_command_parser().parse_known_args(rest)
            assert not unknown, unknown
            check_exists(options.config_file)
            first = [] if options.no_python else ["python"]
            check([*first, options.training_script, *options.training_script_args])
        case ["torchrun", *rest]:
            options = get_args_parser().parse_args(rest)
            check(["python", options.training_script, *options.training_script_args])
        case ["sbatch", script, *rest]:
            check_exists(script)
            check_bdm(["train", *rest])
        case ["pytest", "-m", "slow", *files]:
            check_exists(*files)
        case ["docker", *rest]:  # its files have tests of their own
            check_exists(*re.findall(r"[\w.]+\.yaml", " ".join(rest)))
            if "serve" in rest:
                check_bdm(rest[rest.index("serve") :])
        case ["python" | ".venv/bin/python", script, *rest]:
            check_exists(script)
            if script in ("train.py", "infer.py"):
                check_bdm([script.removesuffix(".py"), *rest])
        case ["bdm" | ".venv/bin/bdm", *rest]:
            check_bdm(rest)
        case _:
            raise AssertionError(f"an unknown command: {' '.join(words)}")


def check_exists(*paths):
    for path in paths:
        assert path is None or (ROOT / path).exists(), f"{path} does not exist"


def check_extras(packages):
    for package, _, extras in (one.partition("[") for one in packages):
        assert package not in ("bdm", ".") or set(re.findall(r"\w+", extras)) <= set(EXTRAS), extras


def check_bdm(arguments):
    options = cli.parse(arguments)
    named = getattr(options, "config", None)
    if named is None or PLACEHOLDER.match(named):
        return
    if arguments[0] == "evaluate":  # of several kinds
        read_evaluation(ROOT / named, options.overrides)
        return
    schemas = {
        "train": RunConfig,
        "plan": RunConfig,
        "prepare": PrepareConfig,
        "index": IndexConfig,
        "vocabulary": VocabularyConfig,
        "ship": ShipConfig,
    }
    schema = (
        {**BENCHES, "gpu": BenchGpuConfig}[options.kind] if arguments[0] == "bench" else schemas[arguments[0]]
    )
    read_config(ROOT / named, options.overrides, schema)


SHELL = [block for page in PAGES for block in blocks(page, "bash")]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_on_the_pages(block):
    found = commands(block.text)
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences(page):
    for words in inline_commands(page):
        if words[0] == "bdm" and (len(words) == 2 or words[-1] in ("...", "--help")):  # a command's name
            assert words[1] in ("--help", *subcommands()), words
        elif words not in (["python", "infer.py"], ["python", "train.py"], ["accelerate", "launch"]):
            check(words)


def subcommands():
    (actions,) = (
        action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return actions.choices


def test_every_command_is_on_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in subcommands():
        assert re.search(rf"\b(bdm|make) {name}\b", text), name


def options_of_all():
    return {
        text
        for parser in [*subcommands().values(), launch_command_parser(), get_args_parser()]
        for action in parser._actions
        for text in action.option_strings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_sentences(page):
    # What a prompt file says in its lines is A1111's.
    text = re.sub(r"^```text\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^docker .*?(?= serve |$)", "", text, flags=re.MULTILINE)  # its own
    named = set(re.findall(r"(?<![\w=-])--[a-z][\w-]+", text))
    # Pages for people from elsewhere name other programs' options, which are understood.
    assert {our_option(name) for name in named} | (named & options_of_all()) <= options_of_all()


def test_every_option_says_what_it_does():
    for name, parser in subcommands().items():
        for action in parser._actions:
            assert action.help, f"bdm {name} {action.option_strings or action.dest}"


def setting_names():
    """The keys of all configurations, each with the group it is in: "recipe.timesteps"."""
    groups = {"optimizer": [config.OptimizerConfig], "recipe": [], "data": []}
    for name in ("recipe", "data"):
        module = getattr(config, name)
        groups[name] = [
            kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
    return {
        f"{group}.{key}" for group, kinds in groups.items() for kind in kinds for key in kind.model_fields
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_sentences(page):
    named = set(re.findall(r"`((?:recipe|optimizer|data)\.\w+)[`:= ]", page.read_text(encoding="utf-8")))
    modules = {"data.source"}
    assert named - modules <= setting_names()


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for path in paths(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


def test_there_are_configurations():
    assert len(CONFIGS) > 30


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headers_say_what_a_configuration_does_and_how_it_is_launched(path: Path):
    assert header(path)
    assert header(path)[0].split()[0] not in ("python", "bdm", "accelerate", "sbatch")
    found = header_commands(path)
    assert any(str(path.relative_to(ROOT)) in words for words in found), f"{path} names no command of its own"
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "bdm infer 龙 --lorra FILE",
        "bdm draw 龙",
        "python train.py configs/quickstart.yaml optimiser.steps=3",
        "python train.py configs/quickstart.yaml optimizer.stepz=3",
        "python train.py configs/none.yaml",
        "bdm bench decode configs/bench/load.yaml",
        "accelerate launch --config_file configs/accelerate/none.yaml train.py CONFIG.yaml",
        "accelerate launch --no_such train.py CONFIG.yaml",
        "torchrun --nproc_per_node 2 infer.py --promt FILE",
        "sbatch configs/slurm/none.sbatch CONFIG.yaml",
        "python examples/none.py",
        "make everything",
        "pip install 'bdm[emoticons]'",
        "curl https://example.org",
    ],
)
def test_a_wrong_command_is_found(line):
    (words,) = commands(line)
    with pytest.raises((AssertionError, UserError, SystemExit)):
        check(words)
