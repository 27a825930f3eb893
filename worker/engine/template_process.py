"""`python -m worker.engine.template_process <fd>`: renders chat templates for `chat_templates`."""

import contextlib
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import msgspec
from transformers.utils.chat_template_utils import render_jinja_template

CPU_SECONDS = 2.0
"""For one chat. Those of well-known models take a thousandth."""
_MAX_BYTES = 512 << 20
"""Of the process."""
_MAX_CHARACTERS = 16 << 20
"""Of a prompt; as much as the line of an input may have."""


class Request(msgspec.Struct, frozen=True):
    """A chat to be rendered, as transformers renders it."""

    template: str
    messages: list[dict[str, Any]]
    special_tokens: dict[str, Any]


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of it."""

    text: str = ""
    error: str | None = None


def main() -> None:
    """Answer requests until nobody is there any more."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    with Connection(int(sys.argv[1])) as asking, contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = msgspec.json.decode(asking.recv_bytes(), type=Request)
            # The signal ends the process, whatever it is doing.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            answer = msgspec.json.encode(_render(request))
            signal.setitimer(signal.ITIMER_PROF, 0)
            asking.send_bytes(answer)


def _render(request: Request) -> Rendered:
    try:
        rendered: Any = render_jinja_template(
            conversations=[request.messages],
            chat_template=request.template,
            add_generation_prompt=True,
            **request.special_tokens,
        )
    except MemoryError:
        return Rendered(error=f"it needs more than {_MAX_BYTES >> 20} MiB")
    except Exception as exc:  # noqa: BLE001 (whatever it likes: `raise_exception` is what a template says no by)
        return Rendered(error=str(exc) or type(exc).__name__)
    text = rendered[0][0]
    if len(text) > _MAX_CHARACTERS:
        return Rendered(error=f"it makes {len(text)} characters of them, {_MAX_CHARACTERS} are allowed")
    return Rendered(text)


if __name__ == "__main__":
    main()
