"""The library as others install it: a wheel from the tree or from the source archive, far from both."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
#: What PyPI takes of one file without asking.
LARGEST = 100_000_000


def run(*command: object, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source archive that the tree gives."""
    folder = tmp_path_factory.mktemp("built")
    venv.create(folder / "builder", with_pip=True)
    python = folder / "builder" / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
        "pip",
        "hatchling",
        folder=ROOT,
    )
    run(python, "-m", "hatchling", "build", "--directory", folder, folder=ROOT)
    return folder


@pytest.mark.slow
def test_the_source_archive_gives_the_same_wheel(built):
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    python = built / "builder" / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built / "again")
    run(python, "-m", "pip", "wheel", *options, archive, folder=built)
    assert contents(wheel) == contents(built / "again" / wheel.name)
    assert max(wheel.stat().st_size, archive.stat().st_size) < LARGEST
    assert {"bdm/py.typed", "bdm/configs/quickstart.yaml", "bdm/assets/LICENSE"} <= set(contents(wheel))


@pytest.mark.slow
def test_a_wheel_draws_from_an_empty_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "user", with_pip=True)
    python = tmp_path / "user" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, folder=tmp_path)
    # What it depends on is not downloaded again. The library is not among it, being installed here by a link.
    paths = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path)
    (Path(paths.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import bdm; print(bdm.__file__)", folder=empty)
    assert Path(where.strip()).is_relative_to(tmp_path / "user")
    bdm = tmp_path / "user" / "bin" / "bdm"
    run(bdm, "infer", "红灯笼", "--steps", "4", folder=empty)
    run(bdm, "demo", "--steps", "2", folder=empty)
    run(bdm, "train", "configs/quickstart.yaml", "--check", folder=empty)
    assert {path.name for path in empty.iterdir()} == {"out.png", "demo.png"}
    here = (sys.executable, ROOT / "infer.py", "红灯笼", "--steps", "4", "--out", tmp_path / "here.png")
    run(*here, folder=tmp_path)
    assert np.array_equal(*(np.asarray(Image.open(p)) for p in (empty / "out.png", tmp_path / "here.png")))
