"""Moto's server, whose clock is made cheap: `python -m tests.chaos.server -H 127.0.0.1 -p PORT`.

Moto reads its clock twice for every message of a queue in nearly every call, and takes 20 microseconds each
time; with thousands of messages that is most of what it does.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.sync import servers


@contextmanager
def serving() -> Iterator[str]:
    """Such a server in a process of its own; its address."""
    (port,) = servers._free_ports(1)
    command = [sys.executable, "-m", "tests.chaos.server", "-H", servers.HOST, "-p", str(port)]
    with servers._process(command, f"http://{servers.HOST}:{port}") as address:
        yield address


def main() -> None:
    """Serve until killed."""
    from moto import server
    from moto.sqs import models

    models.unix_time = time.time
    models.unix_time_millis = lambda: time.time() * 1000
    server.main(sys.argv[1:])


if __name__ == "__main__":
    main()
