"""Nothing is ever fetched: arguments that would fetch weights are off, and a guard holds the network shut."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import UserError

EVENTS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.sendto",
    "socket.sendmsg",
    "urllib.Request",
)
"""Of ``sys.audit``: what Python announces before it talks to another machine."""

# hosts that were asked for inside the block; None: outside of one
_asked: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("asked", default=None)
_hooked: list[bool] = []


@contextlib.contextmanager
def offline(what: str) -> Iterator[None]:
    """In this thread, no other machine is spoken to inside the block.

    Args:
        what: is done there, for the message.

    Raises:
        UserError: something inside tried to, and gave up; the message names the host.
    """
    if not _hooked:
        # stays for good, and does nothing outside of a block
        sys.addaudithook(_hook)
        _hooked.append(True)
    asked: list[str] = []
    token = _asked.set(asked)
    try:
        yield
    except Exception as error:
        # libraries wrap errors of the network in their own
        if asked:
            raise UserError(
                f"{what} tried to fetch something from {asked[0]}: nothing is ever fetched; give it arguments with"
                " which it builds without, and load weights with --from"
            ) from error
        raise
    finally:
        _asked.reset(token)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS or (asked := _asked.get()) is None:
        return
    host = _host(event, arguments)
    if host is not None:
        asked.append(host)
        raise UserError(f"nothing is ever fetched: {host}")


def _host(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The other machine; None: another process of this one."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        sock, address = arguments[:2]
        if getattr(sock, "family", None) == getattr(socket, "AF_UNIX", None) or address is None:
            return None
        return str(address[0]) if isinstance(address, tuple) and address else str(address)
    first = arguments[0]
    return first.decode(errors="replace") if isinstance(first, bytes) else str(first)


def fetches(name: str, value: Any) -> bool:
    """Whether an argument of that name, with a value of that kind, is one that fetches weights."""
    if name.endswith("weights"):
        # numbers under such a name are weights themselves, e.g. of classes
        return isinstance(value, bool) or not isinstance(
            value, list | tuple | Mapping | int | float
        )
    return "pretrained" in name or name.endswith("url")


def switched_off(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` for ``cls`` with everything off that fetches weights, where it is so by default too."""
    found: dict[str, Any] = _off(arguments)
    for name, parameter in inspect.signature(cls).parameters.items():
        default = parameter.default
        given = default is not inspect.Parameter.empty
        if name not in found and given and default and fetches(name, default):
            found[name] = False if isinstance(default, bool) else None
        elif name in found and found[name] is None and isinstance(default, bool):
            found[name] = False if fetches(name, default) else None
    return found


def _off(value: Any) -> Any:
    if isinstance(value, list):
        return [_off(v) for v in value]
    if isinstance(value, Mapping):
        return {
            k: (False if isinstance(v, bool) else None) if fetches(str(k), v) else _off(v)
            for k, v in value.items()
        }
    return value


def refuse_fetching(arguments: Mapping[str, Any], where: str = "network.arguments") -> None:
    """For a new configuration.

    Raises:
        UserError: an argument, also inside lists and dictionaries, that would fetch weights.
    """
    for name, value in arguments.items():
        at = f"{where}.{name}"
        if value and fetches(name, value):
            raise UserError(
                f"{at}: nothing is ever fetched: leave it out, got {value!r}; weights that are there already are"
                " loaded with train --from"
            )
        inner = value if isinstance(value, list) else [value]
        for i, v in enumerate(inner):
            if isinstance(v, Mapping):
                refuse_fetching(v, f"{at}[{i}]" if isinstance(value, list) else at)
