"""The host names that the page accepts, as protection against DNS rebinding."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(\d{1,5}))?")


class Hosts:
    """The host names that the page accepts.

    Args:
        host, port: the address that it is bound to.
        others: further names, each with or without a port.
    """

    def __init__(self, host: str, port: int, others: Sequence[str] = ()) -> None:
        self.port = port
        self.everywhere = _is_everywhere(host)
        self.others = {other.lower() for other in others}
        self.own = {in_address(host)} | ({"127.0.0.1", "localhost", "[::1]"} if is_loopback(host) else set())

    def __contains__(self, given: str) -> bool:
        """Whether a Host header or the part of an Origin after `//` is one of them."""
        found = _HOST.fullmatch(given.lower())
        if found is None:
            return False
        name, port = found[1], found[2] or "80"
        if given.lower() in self.others or name in self.others:
            return True
        # The owner of a name can point it at this machine, but an address is safe. The port is not checked, because a
        # container's port has another number outside.
        if self.everywhere and (name == "localhost" or _is_address(name)):
            return True
        return name in self.own and port == str(self.port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_address(host: str) -> str:
    """A host as it is written in a URL."""
    return f"[{host}]" if ":" in host else host.lower()


def _is_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
