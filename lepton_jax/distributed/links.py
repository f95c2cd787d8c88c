"""Lines of JSON between host 0 and each other host: who is there, what host 0 says, who is gone.

A host that dies closes its links, and one that is cut off fails the keep-alive, or acknowledges
nothing that is sent to it: the others learn it within seconds and end with a line that names it,
where a collective would wait for long. A stopped process still answers both: it is waited for.
Numbers of models never travel here. Read next: `hosts.py`.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 5,  # seconds
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 2,  # times
    "TCP_USER_TIMEOUT": 15_000,  # milliseconds; while data waits for its receipt nothing is probed
}
_GREETING = 5.0  # seconds for a host to say which it is
GONE = 2  # exit code of those that are left behind


class Link:
    """One connection. A thread reads it; `gone` is called when it ends without a farewell."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # macOS lacks two of them: its defaults stay
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8", newline="\n")
        self._came: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = False

    def send(self, message: Any) -> None:
        """Raises OSError where the other side is gone."""
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def read(self) -> Any:
        """The next message, before `watch`. Raises OSError where the other side is gone."""
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the connection was closed")
        return json.loads(line)

    def introduced(self) -> int | None:
        """The index of the host on the other side; None of a stranger, such as a port scanner."""
        self._connection.settimeout(_GREETING)
        try:
            index = self.read()["index"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        self._connection.settimeout(None)
        return index if type(index) is int and index > 0 else None

    def watch(self, gone: Callable[[str, int], None]) -> None:
        """From now on `next` gives messages; `gone` is called with the reason, or "", and the code
        to exit with.
        """
        threading.Thread(target=self._watch, args=(gone,), daemon=True).start()

    def next(self) -> Any:
        """Waits for the next message."""
        return self._came.get()

    def close(self) -> None:
        """Says farewell, so that the other side doesn't take this for a death."""
        self._ended = True
        try:
            self.send({"farewell": ""})
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other side has left already

    def _watch(self, gone: Callable[[str, int], None]) -> None:
        try:
            while True:
                message = self.read()
                if "farewell" in message:
                    if message["farewell"]:
                        gone(message["farewell"], message["code"])
                    return
                self._came.put(message)
        except (OSError, ValueError):
            if not self._ended:
                gone("", GONE)


def tell(links: Iterable[Link], message: Any) -> None:
    """Sends to all that are there."""
    for link in links:
        with contextlib.suppress(OSError):
            link.send(message)


def accept(address: tuple[str, int], count: int, seconds: float) -> dict[int, Link]:
    """Links of hosts 1 to count - 1, by index.

    Raises ValueError naming those that don't come, or whose index is another's; those that have
    come are told it as the "problem".
    """
    try:
        server = socket.create_server(("", address[1]))
    except OSError as error:
        raise ValueError(
            f"hosts.coordinator: port {address[1]} of this host can't be opened "
            f"({error.strerror}): give another port"
        ) from error
    came: list[Link] = []
    try:
        with server:
            return _accepted(server, count, seconds, came=came)
    except ValueError as error:
        tell(came, {"problem": str(error)})
        raise


def _accepted(
    server: socket.socket, count: int, seconds: float, *, came: list[Link]
) -> dict[int, Link]:
    """Adds each host that comes to `came`."""
    links: dict[int, Link] = {}
    end = time.monotonic() + seconds
    while len(links) < count - 1:
        server.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            missing = [n for n in range(1, count) if n not in links]
            raise ValueError(
                f"hosts {missing} of hosts.count={count} haven't come within "
                f"hosts.timeout={seconds:g} s: start the same command on each, with its "
                "hosts.index"
            ) from error
        link = Link(connection)
        index = link.introduced()
        if index is None:
            connection.close()
            continue
        came.append(link)
        if index in links:
            raise ValueError(f"two hosts have hosts.index={index}: give each its own")
        if index >= count:
            raise ValueError(f"a host has hosts.index={index}, and hosts.count={count} here")
        links[index] = link
    return links


def connect(address: tuple[str, int], index: int, seconds: float) -> Link:
    """The link to host 0. Raises ValueError where it can't be reached."""
    end = time.monotonic() + seconds
    while True:
        try:
            link = Link(socket.create_connection(address, timeout=5.0))
            link.send({"index": index})
            return link
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"hosts.coordinator={address[0]}:{address[1] - 1} can't be reached within "
                    f"hosts.timeout={seconds:g} s ({error}): start host 0, and open this port and "
                    "the next one to the other hosts"
                ) from error
            time.sleep(0.2)


def leave(message: str, code: int) -> None:
    """Ends this process at once: a collective that waits for the dead can't be interrupted."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
