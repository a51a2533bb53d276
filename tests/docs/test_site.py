"""The site builds without a warning, and its API pages hold the public names."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from pages import ROOT

import bdm

GENERATOR = ("sphinx", "furo", "myst_parser")
needs_generator = pytest.mark.skipif(
    not all(map(find_spec, GENERATOR)), reason="the site's generator is missing: pip install '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(out / "html")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return out / "html"


@needs_generator
def test_the_site_builds_without_a_warning(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file()


@needs_generator
def test_every_room_has_an_api_page(site):
    for path in (ROOT / "bdm").iterdir():
        if path.name != "cli" and ((path / "__init__.py").is_file() or path.suffix == ".py"):
            assert path.stem == "__init__" or (site / "api" / f"{path.stem}.html").is_file(), path


@needs_generator
def test_calls_and_settings_are_documented(site):
    pipeline = (site / "api" / "pipeline.html").read_text(encoding="utf-8")
    assert "bdm.pipeline.pipelines.BridgeMixin.__call__" in pipeline
    assert "negative_prompt_en" in pipeline
    assert "bdm.config.run.OptimizerConfig" in (site / "api" / "config.html").read_text(encoding="utf-8")


@needs_generator
def test_public_names_lead_to_their_documentation(site):
    links = re.findall(r'href="(api/[^"]+#bdm[^"]+)"', (site / "api.html").read_text(encoding="utf-8"))
    assert len(set(links)) == len(bdm.__all__)


def test_the_api_page_lists_the_public_names():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = [line.partition("`bdm.")[2].partition(" ")[0] for line in text.splitlines() if "`bdm." in line]
    assert sorted(listed) == sorted(bdm.__all__)
