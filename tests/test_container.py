"""The container's files: what they name exists, and their commands do what they say, without Docker."""

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from bdm import cli

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(text):
    """(word, rest) of each instruction, its lines joined."""
    lines = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def stages(text):
    """The instructions of each stage, by its name."""
    found = {"": []}
    for word, rest in instructions(text):
        if word == "FROM":
            found[rest.split()[-1]] = []
        list(found.values())[-1].append((word, rest))
    return found


def of(word, stage="server"):
    return [rest for each, rest in stages(DOCKERFILE)[stage] if each == word]


def environment():
    pairs = [pair.partition("=") for rest in of("ENV") for pair in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


def ignored(path):
    """Whether .dockerignore keeps a path of the top folder away."""
    away = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            back = line.startswith("!")
            away = not back if fnmatch(path, line.removeprefix("!")) else away
    return away


def compose(*names, **variables):
    """The services' settings, with variables put in."""
    merged = {}
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda m: variables.get(m[1], m[2] or ""), text)
        merged |= yaml.safe_load(text)["services"]["bdm"]
    return merged


def test_a_linter_finds_nothing():
    linter = Path(sysconfig.get_path("scripts"), "hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_all_that_is_copied_is_there_and_not_ignored():
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert {"bdm", "assets", "configs", "pyproject.toml", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for private in (".git", ".venv", "runs", "tests", "Dockerfile", ".env"):
        assert ignored(private), private


def test_the_package_has_all_that_its_build_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = [project["project"]["readme"], *project["project"]["license-files"], *wheel["packages"]]
    copied = [source for rest in of("COPY") for source in rest.split()[:-1]]
    for name in (*named, *wheel["force-include"]):
        assert name.split("/")[0] in copied, name


def test_extras_and_pins_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for rest in of("RUN"):
        asked = [name for group in re.findall(r"/src\[([\w,]+)\]", rest) for name in group.split(",")]
        assert set(asked) <= set(extras["optional-dependencies"]), rest
        pytest.importorskip("bdm.cli.serve")
    for name in ("torch", "torchvision"):
        assert re.search(rf"(?m)^{name}==", pins)


def test_it_runs_as_nobody_in_particular_and_writes_to_its_volume_alone():
    words = [word for word, _ in stages(DOCKERFILE)["server"]]
    (user,) = of("USER")
    assert user.isdecimal()
    assert int(user) > 0
    assert f"--uid {user}" in " ".join(of("RUN"))
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    (volumes,) = of("VOLUME")
    assert json.loads(volumes) == ["/models", "/data"]
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        assert environment()[name].startswith("/data")
    assert environment()["BDM_MODELS"] == "/models"


def test_both_bases_are_stages():
    names = list(stages(DOCKERFILE))
    assert stages(DOCKERFILE)[""] == [("ARG", "BASE=cpu")]
    assert {"cpu", "cuda"} < set(names)
    assert compose("compose.yaml")["build"]["args"]["BASE"] == "cpu"
    assert compose("compose.yaml", "compose.cuda.yaml")["build"]["args"]["BASE"] == "cuda"


def commands():
    pytest.importorskip("bdm.cli.serve")
    (entry,), (arguments,) = of("ENTRYPOINT"), of("CMD")
    started = compose("compose.yaml", BDM_CORS="http://localhost:8000")["command"]
    return json.loads(entry), [json.loads(arguments), started]


def test_what_it_starts_is_a_command_of_bdm_on_its_port():
    entry, started = commands()
    assert entry == ["bdm"]
    (port,) = of("EXPOSE")
    for arguments in started:
        options = cli.parse(arguments)
        assert (options.host, options.port) == ("0.0.0.0", int(port))
    assert options.cors == ["http://localhost:8000"]
    assert f":{port}/healthz" in " ".join(of("HEALTHCHECK"))
    assert compose("compose.yaml")["ports"] == [f"127.0.0.1:8000:{port}"]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_says_what_the_server_says(status, healthy):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *said):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    port = server.server_port
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    (check,) = of("HEALTHCHECK")
    python, *arguments = json.loads(check.partition("CMD ")[2])
    assert python == "python3"
    arguments = [each.replace(":8000/", f":{port}/") for each in arguments]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, check=False, timeout=60)
    assert (done.returncode == 0) is healthy
    if status is not None:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_build_steps_run(tmp_path):
    """All but the one that makes the user, in a folder of their own.

    torch and the rest of what the package needs is that of this environment, which pip finds satisfied.
    """
    python, packages = sys.executable, sysconfig.get_path("purelib")
    places = {"/src": tmp_path / "src", "/opt/bdm": tmp_path / "venv"}
    link = f'&& echo {packages} > "$({places["/opt/bdm"]}/bin/python -c {HERE})/here.pth"'
    environ = {**os.environ, **environment(), "PATH": f"{places['/opt/bdm']}/bin:{os.environ['PATH']}"}
    environ.pop("PYTHONPATH", None)
    for word, rest in stages(DOCKERFILE)["server"]:
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(ROOT / source, tmp_path / target.lstrip("/"), into=target.endswith("/"))
        elif word == "RUN" and "useradd" not in rest:
            for name, place in places.items():
                rest = rest.replace(name, str(place))
            rest = rest.replace("python3 -m venv", f"{python} -m venv").replace("&&", f"{link} &&", 1)
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", rest],
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            link = ""
    (entry,), (arguments,) = of("ENTRYPOINT"), of("CMD")
    command = [places["/opt/bdm"] / "bin" / json.loads(entry)[0], *json.loads(arguments)]
    environ |= {name: str(tmp_path / "data") for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME")}
    refused = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "API key" in refused.stderr  # it asks for what it needs
    assert not (tmp_path / "src").exists()


#: Where a venv keeps packages.
HERE = shlex.quote("import sysconfig; print(sysconfig.get_path('purelib'))")


def copy(source, target, into):
    """As COPY: folders by what is in them, files into a folder or under a name."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        where = target / source.name if into else target
        where.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, where)
