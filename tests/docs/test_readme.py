"""The README: its tree is the real one, its links lead somewhere, its translation says the same."""

import re
import tomllib
from collections import Counter

import pytest
from pages import ROOT, blocks, without_comments
from test_structure import ROOMS

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
ENGLISH, CHINESE = (path.read_text(encoding="utf-8") for path in READMES)


def tree(page):
    """The entries that a README's tree lists."""
    (text,) = (block.text for block in blocks(page, "") if block.text.startswith("bdm/\n"))
    return re.findall(r"^  (\S+)  +\S", text, re.MULTILINE)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_tree_lists_what_is_there(page):
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "bdm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(tree(page)) == there - {"__init__.py"}


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_tree_is_in_the_order_of_imports(page):
    assert [name.removesuffix("/").removesuffix(".py") for name in tree(page)] == ROOMS


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_translation_has_the_same_headings_and_code():
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    code = [
        [(block.language, without_comments(block.text)) for block in blocks(page) if block.language]
        for page in READMES
    ]
    assert code[0] == code[1]
    assert len(code[0]) >= 5


def test_the_translation_has_the_same_figures():
    figures = [Counter(re.findall(r"\d[\d.,x]*\d|\d", prose(text))) for text in (ENGLISH, CHINESE)]
    assert figures[0] == figures[1]


def test_the_readmes_are_short_and_link_to_each_other():
    assert "](README.zh.md)" in ENGLISH
    assert "](README.md)" in CHINESE
    assert max(len(text.splitlines()) for text in (ENGLISH, CHINESE)) <= 130


@pytest.mark.parametrize("page", ["start.md", "start.zh.md"])
def test_every_extra_is_listed(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(project["optional-dependencies"])
