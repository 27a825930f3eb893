"""Messages between two processes of one machine, over a socket: each a length, then its bytes."""

import socket
import struct

_LENGTH = struct.Struct("<Q")
_AT_ONCE = 1 << 30


class Gone(Exception):
    """The other side has closed, or ended, or stands still."""


class Channel:
    """One end, used from one thread at a time. What raised `Gone` is of no more use."""

    def __init__(self, end: socket.socket, timeout_seconds: float) -> None:
        """`timeout_seconds`: how long what is received may stand still, or a piece that is sent may take."""
        self._socket = end
        self._timeout = timeout_seconds

    def send(self, *parts: bytes | memoryview) -> None:
        """Send a message, in pieces that are put together. Raises Gone."""
        self._socket.settimeout(self._timeout)
        try:
            self._socket.sendall(_LENGTH.pack(sum(len(part) for part in parts)))
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise Gone(f"it takes no messages: {error}") from error

    def receive(self, timeout_seconds: float | None) -> bytearray:
        """The next message, for which to wait so long, or for ever. Raises Gone."""
        try:
            self._socket.settimeout(timeout_seconds)
            head = bytearray(_LENGTH.size)
            view = memoryview(head)
            first = self._received(view)
            self._socket.settimeout(self._timeout)
            self._fill(view[first:])
            message = bytearray(*_LENGTH.unpack(head))
            self._fill(memoryview(message))
        except TimeoutError as error:
            raise Gone("it does not answer") from error
        except OSError as error:
            raise Gone(f"it sends no messages: {error}") from error
        return message

    def close(self) -> None:
        """Have the other side find out."""
        self._socket.close()

    def _fill(self, view: memoryview) -> None:
        while view:
            view = view[self._received(view) :]

    def _received(self, view: memoryview) -> int:
        count = self._socket.recv_into(view, min(len(view), _AT_ONCE))
        if not count:
            raise Gone("it has closed")
        return count
