"""Chat templates that came with an upload, rendered where they can do no harm."""

import multiprocessing
import signal
import subprocess
import threading
import weakref
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from worker.child import child_command
from worker.engine.template_process import CPU_SECONDS, Rendered, Request
from worker.errors import InvalidLine

_MODULE = "worker.engine.template_process"
_ANSWER_SECONDS = 60.0
"""By the clock; it has far less of a processor, but may have to wait for one, and to start."""


class ChatTemplates:
    """Renders one template at a time, in a process of its own that starts with the first. From any thread.

    Jinja's sandbox keeps a template from files and Python, but not from running for years, or from asking
    for all memory; and in a thread it would hold the interpreter's lock, heartbeats and all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def render(self, template: str, messages: list[dict[str, Any]], special_tokens: dict[str, Any]) -> str:
        """The text that transformers makes of `messages`, ready for an answer.

        Raises InvalidLine with the reason, TemplateTooSlow if that is what it is.
        """
        request = msgspec.json.encode(Request(template, messages, special_tokens))
        with self._lock:
            if self._process is None:
                self._process = _Process()
            try:
                answer = self._process.ask(request)
            except (EOFError, OSError):
                code, self._process = self._process.end(), None
                if code == -signal.SIGPROF:
                    raise TemplateTooSlow(f"it takes more than {CPU_SECONDS:g} seconds") from None
                raise InvalidLine(f"the process that rendered it ended, with exit code {code}") from None
        rendered = msgspec.json.decode(answer, type=Rendered)
        if rendered.error is not None:
            raise InvalidLine(rendered.error)
        return rendered.text


class TemplateTooSlow(InvalidLine):
    """It was stopped."""


class _Process:
    def __init__(self) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        with theirs:
            process = subprocess.Popen(  # noqa: S603 (our own program)
                child_command(_MODULE, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = process.pid
        self.end = weakref.finalize(self, _end, process, self._ours)
        """Also when nobody needs it any more. Returns the exit code."""

    def ask(self, request: bytes) -> bytes:
        """Raises EOFError or OSError if it has ended, or stands still."""
        self._ours.send_bytes(request)
        if not self._ours.poll(_ANSWER_SECONDS):
            raise TimeoutError
        return self._ours.recv_bytes()


def _end(process: "subprocess.Popen[bytes]", ours: "Connection[bytes, bytes]") -> int:
    ours.close()
    process.kill()
    return process.wait()
