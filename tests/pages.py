"""The pages as their tests read them: code blocks, the commands in these, the paths that are named."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "README.zh", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.*"))


@dataclass(frozen=True)
class Block:
    """A fenced block of code: where it begins, what it is written in ("" where nothing is said), its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    found, text, start, fence = [], [], 0, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is None and line.startswith("```"):
            fence, start, text = line.removeprefix("```"), number, []
        elif fence is not None and line == "```":
            found.append(Block(str(page.relative_to(ROOT)), start, fence, "\n".join(text)))
            fence = None
        elif fence is not None:
            text.append(line)
    return [block for block in found if language in (None, block.language)]


def commands(text: str) -> list[list[str]]:
    """The words of each command in shell lines, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words for words in split if words]


def inline_commands(page: Path) -> list[list[str]]:
    """The commands that stand in a page's sentences and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:python|bdm|make|pip|accelerate|torchrun|sbatch) [^`]+)`", text)
    # In a table a backslash stands before each bar. The kind of a benchmark is a choice, for which no
    # placeholder is taken.
    plain = (line.replace("\\|", "|").replace("KIND", "infer") for line in found)
    return [words for line in plain for words in commands(line)]


def header(path: Path) -> list[str]:
    """The comment lines at the top of a configuration, without their marks."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!")]
    ends = next((i for i, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    return [line.removeprefix("# ") for line in lines[:ends]]


def header_commands(path: Path) -> list[list[str]]:
    """The commands in a configuration's header: each stands on a line of its own, or ends one behind ": "."""
    text = "\n".join(header(path)).replace("\\\n", " ")
    starts = r"(?:^|: )((?:python|bdm|accelerate|torchrun|sbatch) .+)$"
    return [words for line in re.findall(starts, text, re.MULTILINE) for words in commands(line)]


def without_comments(text: str) -> str:
    """Code without the comments behind it, which a translation translates."""
    return "\n".join(re.sub(r"\s+# .*$", "", line) for line in text.splitlines())


def paths(text: str) -> set[str]:
    """The paths of this repository that a text names."""
    text = re.sub(r"\S+/\S*FILE\S*|docs/_build|\.venv/bin/\S+", "", text)
    rooms = "bdm|configs|assets|docs|examples|tests"
    found = re.findall(rf"(?<![\w/.@-])(?:{rooms})/[\w./*{{}},-]*[\w*/}}]", text)
    return {path for name in found for path in alternatives(name)}


def alternatives(pattern: str) -> list[str]:
    """The paths that a pattern with braces stands for, as a shell expands it."""
    before, brace, rest = pattern.partition("{")
    inside, _, behind = rest.partition("}")
    return [f"{before}{part}{behind}" for part in inside.split(",")] if brace else [pattern]
