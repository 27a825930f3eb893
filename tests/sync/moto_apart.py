"""Moto's server as a process of its own: `python -m tests.sync.moto_apart -H 127.0.0.1 -p PORT`.

Two things of its queues are mended. It reads its clock twice for every message of a queue in nearly every
call, and takes 20 microseconds each time: with thousands of messages that is most of what it does. And it
makes a queue anew without what is deleted: by two threads at once, a message comes back.
"""

import functools
import sys
import time
from typing import Any

from moto import server
from moto.sqs import models


def make_clock_cheap() -> None:
    """For a process that freezes no clock."""
    models.unix_time = time.time
    models.unix_time_millis = lambda: time.time() * 1000


@functools.cache
def lock_deletions() -> None:
    """One deletion at a time of a queue."""
    delete = models.Queue.delete_message

    @functools.wraps(delete)
    def locked(queue: Any, receipt: str) -> None:
        with queue._messages_lock:
            delete(queue, receipt)

    models.Queue.delete_message = locked


if __name__ == "__main__":
    make_clock_cheap()
    lock_deletions()
    server.main(sys.argv[1:])
