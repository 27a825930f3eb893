"""What a handler is told of an adapter, and what it says to that."""

from typing import NamedTuple

from worker.adapters.info import AdapterInfo
from worker.adapters.registrations import Registration
from worker.custom.handler import CustomHandler
from worker.custom.messages import Call
from worker.errors import HandlerBusy, HandlerDied, HandlerRefused, RegistryUnavailable

_SAYS_NOTHING = frozenset({"OK", "No content", ""})


class Known(NamedTuple):
    said: Registration
    path: str
    """What the handler was told as `src`."""
    in_folder: bool = False
    trouble: str | None = None
    """Why the handler does not know it."""


def told(function: str, known: Known) -> Call:
    """What a handler is told of an adapter: DJL's properties, and content that has all."""
    said, path = known.said, known.path
    properties = {"name": said.name, "alias": said.alias or said.name, "src": path}
    flags = {"preload": str(said.preload).lower(), "pin": str(said.pin).lower()}
    content = {"name": said.name, "src": path, **flags, **said.options}
    return Call(function, properties, tuple((key, value.encode()) for key, value in content.items()))


def gone(known: Known, alias: str | None = None) -> Call:
    """What it is told of one that is there no more."""
    name = known.said.name
    return Call("unregister_adapter", {"name": name, "alias": alias or known.said.alias or name})


async def ask(handler: CustomHandler, call: Call) -> str | None:
    """Tell it, and return what it says became of the adapter, if it says anything.

    Raises HandlerRefused for an answer that is a failure, RegistryUnavailable for none.
    """
    try:
        answer = await handler.call(call.function, call.properties, call.content)
        await answer.read()
    except HandlerBusy as error:
        raise RegistryUnavailable(str(error)) from error
    except HandlerDied as error:
        raise HandlerRefused(str(error), 424) from error
    if answer.is_failure:
        raise HandlerRefused(answer.reason, answer.status if 400 <= answer.status <= 599 else 424)
    return None if answer.message in _SAYS_NOTHING else answer.message


def info_of(known: Known) -> AdapterInfo:
    """As list and describe tell it."""
    said, path, _, trouble = known
    return AdapterInfo(
        name=said.name,
        src=said.src or path,
        preload=said.preload,
        pin=said.pin,
        options=said.options,
        tier="handler",
        version=said.version,
        rank=None,
        bytes=None,
        requests=None,
        note=trouble,
    )
