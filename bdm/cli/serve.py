"""``serve`` and ``web``: a server of pictures, and the same with a page."""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, printable
from .heavy import importing
from .model_options import device_option, model_options
from .quiet import quiet

if TYPE_CHECKING:
    from ..drawing.library import Library
    from ..serving.app import Settings

_KEY = "BDM_API_KEY"


def add_commands(commands: Any) -> None:
    """Add ``serve`` and ``web`` to a parser's commands."""
    serve = commands.add_parser("serve", help="a server that A1111's and OpenAI's clients can call")
    _options(serve)
    serve.set_defaults(run=_serve, page=False)

    web = commands.add_parser("web", help="the server, with a page to draw on")
    _options(web)
    web.set_defaults(run=_serve, page=True)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0 for a free one")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FOLDER",
        help="of pictures and the journal (default: in the user's data)",
    )
    _drawing(parser)
    _access(parser.add_argument_group("who may use it"))
    _limits(parser.add_argument_group("what one request may ask for"))


def _drawing(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    device_option(parser)
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="pictures that share a step (default: by memory)"
    )
    parser.add_argument(
        "--no-joining", action="store_true", help="draw one picture after the other, each alone"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where pictures are drawn: in this process (the default), or by replicas on a Ray cluster",
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="with --engine ray: processes that draw (default: one for each GPU of the cluster, or one)",
    )
    parser.add_argument(
        "--prompts-are",
        choices=("split", "native", "english"),
        default="split",
        help="what a prompt is where a client gives no native_prompt: split by script (the default), all"
        " native, or all English",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="in which a stop finishes what was accepted; the rest is handed back (default 30)",
    )


def _access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"whose first line is the API key (or give it in {_KEY})",
    )
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page that may call the server, such as https://pictures.example.org; repeatable",
    )


def _limits(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("side", "pixels of width and height"),
        ("steps", "steps of denoising"),
        ("pictures", "pictures"),
        ("text", "characters of each prompt"),
        ("queue", "pictures that wait or are drawn, of all requests together"),
        ("body", "bytes of a request's body"),
        ("upload", "pixels of a picture that is sent"),
    ):
        group.add_argument(f"--max-{name}", type=int, metavar="N", help=f"{what}, at most")


def _serve(options: argparse.Namespace) -> None:
    from ..extras import require_packages

    require_packages("bdm web" if options.page else "bdm serve")
    if options.engine == "ray":
        require_packages("bdm serve --engine ray")
    elif options.replicas is not None:
        raise UserError(f"--replicas {options.replicas} without --engine ray: add that, or leave it out")
    with importing():
        from ..serving.app import build
        from ..serving.server import listening, run

    settings = _settings(options)
    bound = listening(options.host, options.port)
    quiet()
    served = build(settings, lambda library: _engine(options, settings, library))
    for end in served.history.lost:
        print(f"lost: {end.id} was accepted by a server that was ended before it was drawn")
    run(served, bound, lambda: _say_where(options, bound.getsockname()[1], settings))
    print("stopped")


def _say_where(options: argparse.Namespace, port: int, settings: Settings) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(
        f"http://{printable(host)}:{port} is ready; pictures are kept in {printable(settings.history)}",
        flush=True,
    )


def _settings(options: argparse.Namespace) -> Settings:
    from ..serving.app import Settings
    from ..serving.keys import Access
    from ..serving.limits import Limits

    said = {
        name: getattr(options, f"max_{name}") for name in Limits.__dataclass_fields__ if name != "plugins"
    }
    said = {name: value for name, value in said.items() if value is not None}
    wrong = [f"--max-{name} {value}" for name, value in said.items() if value < 1]
    if wrong or not 0 <= options.grace <= 3600 or not 0 <= options.port <= 65535:
        wrong += [f"--grace {options.grace:g}, --port {options.port}"]
        raise UserError(f"{', '.join(wrong)}: give numbers from 1 on, a grace of 0 to 3600 seconds, a port")
    return Settings(
        history=options.history or _data_folder() / "history",
        access=Access(options.host, _key(options), tuple(options.cors)),
        limits=Limits(**said),
        models=tuple(options.models),
        model=options.model,
        prompts=options.prompts_are,
        grace=options.grace,
        page=options.page,
    )


def _data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bdm"


def _key(options: argparse.Namespace) -> str:
    """The API key; never an option, which every user of the machine could read."""
    if options.key_file is None:
        return os.environ.get(_KEY, "").strip()
    try:
        lines = options.key_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text in UTF-8"
        raise UserError(f"--key-file {options.key_file}: {why}; give a file with the key") from None
    if not lines or not lines[0].strip():
        raise UserError(f"--key-file {options.key_file} holds no key in its first line")
    return lines[0].strip()


def _engine(options: argparse.Namespace, settings: Settings, library: Library) -> Any:
    if options.engine == "ray":
        return _ray_engine(options, settings, library)
    from ..serving.engine import Engine

    return Engine(
        models=library,
        device=options.device,
        max_batch=options.max_batch,
        joining=not options.no_joining,
        queue_limit=settings.limits.queue,
    )


def _ray_engine(options: argparse.Namespace, settings: Settings, library: Library) -> Any:
    from ..serving.ray_replicas import ray_engine
    from ..serving.replica import ReplicaSettings

    own = ReplicaSettings(
        models=tuple(folder.absolute() for folder in library.folders),
        device=options.device,
        max_batch=options.max_batch,
        joining=not options.no_joining,
        queue_limit=settings.limits.queue,
        upload=settings.limits.upload,
    )
    # The same for each start of one server, and another for any other.
    place = f"{socket.gethostname()} {settings.history.resolve()}"
    return ray_engine(own, options.replicas, f"bdm-{hashlib.sha256(place.encode()).hexdigest()[:12]}")
