"""What the worker and a handler's process say to each other: msgpack, each message after its length.

The handler's process is not trusted: whatever it sends is checked for type and length before it is used.
"""

import struct

import msgspec

MAX_MESSAGE_BYTES = 128 << 20
_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size

Content = tuple[tuple[str | None, bytes], ...]


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The first message to the process: load this."""

    folder: str
    entry_point: str
    """A file in the folder, or a module."""
    properties: dict[str, str]
    """What every Input has besides its own."""


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Call a function of the handler."""

    function: str
    properties: dict[str, str] = {}
    content: Content = ()


class Head(msgspec.Struct, frozen=True, tag="head"):
    """An answer, whole, or its beginning when it `streams`: then Pieces follow."""

    code: int = 200
    message: str = "OK"
    properties: dict[str, str] = {}
    content: Content = ()
    streams: bool = False


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """The next piece of a stream; with `error` it ends there, and so it does without data."""

    data: bytes = b""
    is_last: bool = False
    error: str | None = None


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The handler's module is there; with `error` it is not."""

    error: str | None = None


ToHandler = Begin | Call
FromHandler = Loaded | Head | Piece

_TO_HANDLER = msgspec.msgpack.Decoder(ToHandler)
_FROM_HANDLER = msgspec.msgpack.Decoder(FromHandler)


def frame(message: ToHandler | FromHandler) -> bytes:
    """A message with its length. Raises ValueError for one that is too long."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"the message has {len(body)} bytes; it may have {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """The length of the message behind these LENGTH_BYTES. Raises ValueError when it is too long."""
    length = int(_LENGTH.unpack(head)[0])
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes was begun; it may have {MAX_MESSAGE_BYTES}")
    return length


def read_to_handler(body: bytes) -> ToHandler:
    message: ToHandler = _TO_HANDLER.decode(body)
    return message


def read_from_handler(body: bytes) -> FromHandler:
    """Raises msgspec.DecodeError for what is no message."""
    message: FromHandler = _FROM_HANDLER.decode(body)
    return message
