"""Who may use a server: its key, the pages that may call it, and the names that it goes by."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError, printable

#: Shorter keys can be guessed.
SHORTEST_KEY = 16
_ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::\d{1,5})?")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
        host: the address that it listens on.
        key: what clients must send; "" for none, on the loopback address alone.
        origins: pages of other servers that may call it.
    """

    host: str = "127.0.0.1"
    key: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key and len(self.key) < SHORTEST_KEY:
            raise UserError(f"the API key has {len(self.key)} characters; give {SHORTEST_KEY} at least")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(
                    f"--cors {printable(origin, 100)}: give origins such as https://pictures.example.org"
                )
        if not is_loopback(self.host) and not (self.key and self.origins):
            lacking = " and ".join(
                word
                for word, there in (("an API key", self.key), ("--cors ORIGIN", self.origins))
                if not there
            )
            raise UserError(
                f"--host {printable(self.host, 100)} is reached from other machines, for which {lacking} must"
                " be given (the key in a file, --key-file, or in BDM_API_KEY); or leave --host out"
            )

    def accepts(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request's headers hold the key: as ``Authorization: Bearer``, as the password of
        ``Authorization: Basic``, or as ``X-API-Key``.

        All that is sent is compared in constant time.
        """
        if not self.key:
            return True
        return any([_equal(said, self.key) for said in _keys(headers)])

    def knows_host(self, host: str) -> bool:
        """Whether a ``Host`` header names this server: without a key, only the loopback address does, so that
        no page can reach it by a name of its own.
        """
        return bool(self.key) or _without_port(host).lower() in _LOOPBACK_NAMES

    def knows_origin(self, origin: str, host: str) -> bool:
        """Whether a page may call: one of this server's own, or of the list."""
        return origin in self.origins or origin.partition("://")[2].lower() == host.lower()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys(headers: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    found = []
    for name, value in headers:
        kind, _, rest = value.partition(b" ")
        if name == b"x-api-key":
            found.append(value)
        elif name == b"authorization" and kind.lower() == b"bearer":
            found.append(rest.strip())
        elif name == b"authorization" and kind.lower() == b"basic":
            try:
                found.append(base64.b64decode(rest, validate=True).partition(b":")[2])
            except (binascii.Error, ValueError):
                continue
    return found


def _equal(said: bytes, key: str) -> bool:
    # Digests are of one length, so that the time tells nothing of the key's.
    return hmac.compare_digest(hashlib.sha256(said).digest(), hashlib.sha256(key.encode()).digest())


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
