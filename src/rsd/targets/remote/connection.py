"""One connection to a policy server in openpi's protocol: the server speaks first, then every message is answered."""

from __future__ import annotations

import sys
from contextlib import suppress

from rsd.checks import last_line, one_line, told
from rsd.extras import extra
from rsd.types import RsdError

with extra("serve"):
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import ClientConnection, connect

TWICE = "expected one answer to each message, found a second one"
SILENCE = 2.0  # seconds of a server that has not said anything, until that is told


class Connection:
    """Whatever is lost or late is an `RsdError` and closes it; `open` connects anew."""

    def __init__(self, address: str, timeout_s: float, expected: str) -> None:
        """address: ws://HOST:PORT; timeout_s: how long to wait for any answer; expected: words what was looked for."""
        self.address, self.timeout_s, self.expected = address, timeout_s, expected
        self._connection: ClientConnection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self) -> bytes | str:
        """Connect -> what the server says first."""
        try:
            self._connection = connect(self.address, compression=None, max_size=None, open_timeout=self.timeout_s)
            return self._receive(first=True)
        # ValueError and OverflowError for a port that is none
        except (OSError, ValueError, OverflowError, WebSocketException) as error:
            expected = f"expected {self.expected} at ws://HOST:PORT, found none that answers"
            raise RsdError(f"{self.address}: {expected} ({told(error)}); start it, or mend the address") from error

    def ask(self, message: bytes) -> bytes:
        """A text is the server's way to say what went wrong."""
        connection = self._opened()
        try:
            with suppress(TimeoutError):
                connection.recv(0.0)  # nothing: what is left would be taken for this one's answer
                raise WebSocketException(TWICE)
            connection.send(message)
        except WebSocketException as error:
            self.close()
            raise RsdError(f"{self.address}: the connection was lost ({told(error)})") from error
        return self.receive()

    def receive(self) -> bytes:
        """Another message that the server sends, as `ask` takes it."""
        answer = self._receive()
        if isinstance(answer, str):
            text = last_line(answer) if answer.lstrip().startswith("Traceback") else one_line(answer)
            raise RsdError(f"{self.address}: {text:.1000}")
        return answer

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _opened(self) -> ClientConnection:
        if self._connection is None:
            raise RsdError(f"{self.address}: the connection was lost; a new episode (`reset`) connects anew")
        return self._connection

    def _receive(self, first: bool = False) -> bytes | str:
        connection = self._opened()
        try:
            if first and self.timeout_s > SILENCE:
                with suppress(TimeoutError):
                    return connection.recv(SILENCE)
                print(f"{self.address}: connected; waiting for it to say what it serves", file=sys.stderr)
            return connection.recv(self.timeout_s)
        except (TimeoutError, WebSocketException) as error:
            self.close()  # a late answer must not be taken for the next one
            reason = f"no answer for {self.timeout_s:g} s" if isinstance(error, TimeoutError) else told(error)
            raise RsdError(f"{self.address}: the connection was lost ({reason})") from error
