"""What a server drew and what became of the rest: pictures, and a journal that outlives the process.

A request is journalled before its client hears that it was accepted, and a picture is on the disk before its
client gets it. What has no end in the journal when the next server starts is told as lost.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drawing.painter import Drawn
from ..drawing.request import Request
from ..errors import UserError, printable
from ..files import atomic_write, to_json

_ID = re.compile(r"[0-9]{14}-[0-9a-f]{6}-[0-9a-f]{8}")
#: Ends of requests that gave no picture, which are remembered so far back.
_MOST_ENDS = 500
#: Bytes of a journal from which on a start keeps no more than its ends.
_LONG_JOURNAL = 8 * 2**20


@dataclass(frozen=True)
class End:
    """What became of a request that gave no picture.

    Attributes:
        id: of the request.
        status: "failed", "cancelled", "returned" (handed back when the server stopped), or "lost" (the server
            was killed).
        why: in one line.
        request: its JSON; None where the journal does not say it any more.
        fault: whether it was no mistake of the request's.
    """

    id: str
    status: str
    why: str = ""
    request: dict[str, Any] | None = None
    fault: bool = False


def new_id() -> str:
    """An identifier that sorts by time and cannot be guessed."""
    now = time.time()
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime(now))
    return f"{stamp}-{int(now % 1 * 0xFFFFFF):06x}-{secrets.token_hex(4)}"


class History:
    """The folder of a server's pictures, which one server writes at a time.

    Args:
        folder: it is made.

    Raises:
        UserError: another server has it, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = folder / "journal.jsonl"
        self._lock = threading.Lock()
        self._ends: OrderedDict[str, End] = OrderedDict()
        try:
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            self._held = _hold(folder)
            self.lost = self._recover()
            self._file = open(self._journal, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"--history {folder}: {error.strerror or error}; choose a folder that can be written"
            ) from None

    @property
    def uploads(self) -> Path:
        """Where pictures that clients sent are kept."""
        return self._folder / "uploads"

    def accept(self, name: str, request: Request, way: str) -> None:
        """Note a request that is to be drawn."""
        self._note({"event": "accepted", "id": name, "way": way, "request": request.to_json()})

    def keep(self, name: str, drawn: Drawn) -> Path:
        """Keep a picture, whole, and only then note that it is done; returns its file."""
        place = self._picture(name)
        drawn.save(place)
        self._note({"event": "done", "id": name})
        return place

    def end(self, end: End) -> None:
        """Note what became of a request that gave no picture."""
        self._remember(end)
        self._note({"event": end.status, "id": end.id, "why": printable(end.why, 500)})

    def picture(self, name: str) -> Path | None:
        """The file of a request's picture; None where there is none."""
        place = self._picture(name) if _ID.fullmatch(name) else None
        return place if place is not None and place.is_file() else None

    def ended(self, name: str) -> End | None:
        """What became of a request that gave no picture, as far back as is remembered."""
        return self._ends.get(name)

    def page(self, before: str = "", most: int = 50) -> list[str]:
        """Identifiers of pictures, the newest first.

        Args:
            before: those that are older than this one; "" for the newest.
            most: so many of them.
        """
        with os.scandir(self._folder / "pictures") as inside:
            names = [entry.name.removesuffix(".png") for entry in inside if entry.name.endswith(".png")]
        found = sorted((name for name in names if _ID.fullmatch(name)), reverse=True)
        return [name for name in found if not before or name < before][:most]

    def remove(self, name: str) -> bool:
        """Delete a picture; whether there was one."""
        place = self.picture(name)
        if place is None:
            return False
        place.unlink(missing_ok=True)
        self._note({"event": "removed", "id": name})
        return True

    def close(self) -> None:
        """Let another server have the folder."""
        self._file.close()
        self._held.close()

    def _picture(self, name: str) -> Path:
        return self._folder / "pictures" / f"{name}.png"

    def _note(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._file.write(to_json(event | {"time": round(time.time(), 3)}) + b"\n")

    def _remember(self, end: End) -> None:
        self._ends[end.id] = end
        while len(self._ends) > _MOST_ENDS:
            self._ends.popitem(last=False)

    def _recover(self) -> list[End]:
        """What a server before this one accepted and neither ended nor drew: it is lost."""
        waiting: dict[str, dict[str, Any]] = {}
        over: set[str] = set()
        for event in _events(self._journal):
            if event["event"] == "accepted":
                waiting[event["id"]] = event.get("request") or {}
                continue
            over.add(event["id"])
            if event["event"] in ("failed", "cancelled", "returned", "lost"):
                said = waiting.get(event["id"])
                self._remember(End(event["id"], event["event"], str(event.get("why", "")), said))
        why = "the server was ended before this was drawn; ask again"
        unended = [name for name in waiting if name not in over and self.picture(name) is None]
        lost = [End(name, "lost", why, waiting[name]) for name in unended]
        self._rewrite(lost)
        return lost

    def _rewrite(self, lost: list[End]) -> None:
        """Note what is lost; a journal that has grown long begins anew with the ends that are remembered."""
        for end in lost:
            self._remember(end)
        known = self._ends.values()
        long = self._journal.is_file() and self._journal.stat().st_size > _LONG_JOURNAL
        said = [{"event": end.status, "id": end.id, "why": end.why} for end in (known if long else lost)]
        with suppress(FileNotFoundError):
            before = b"" if long else self._journal.read_bytes()
            before += b"\n" if before and not before.endswith(b"\n") else b""
            with atomic_write(self._journal) as partial:
                partial.write_bytes(before + b"".join(to_json(event) + b"\n" for event in said))


def _events(journal: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; one that a kill tore is left out."""
    with suppress(FileNotFoundError), open(journal, "rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and _ID.fullmatch(str(event.get("id"))) and "event" in event:
                    yield event


def _hold(folder: Path) -> Any:
    """Keep other servers out of a folder while the file that is returned is open."""
    file = open(folder / "lock", "a")  # noqa: SIM115
    with suppress(ImportError):  # not on every system
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(
                f"--history {folder} is another running server's; stop that one, or choose another folder"
            ) from None
    return file
