"""Fuzzed messages through a real worker, every one of them accounted for.

    python -m tests.poison [--messages 1000] [--seed 1] [--show]

A moto server, a tiny model with two adapters, one worker, and as many messages, most of them wrong. Each must
end in a committed manifest, a failed manifest or a dead letter; both queues must be empty in the end, and the
worker, never started again, must still serve a good job. `--show` prints the messages and sends none. Exit
status: 0 when all of it is so, else 1.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.benchmarks.sides import quiet
from tests.poison.messages import KINDS, messages
from tests.poison.run import Report, run


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m tests.poison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--messages", type=int, default=1000, metavar="N")
    made.add_argument("--seed", type=int, default=1, metavar="N")
    made.add_argument("--show", action="store_true")
    args = made.parse_args(argv)
    fuzzed = messages(args.messages, args.seed)
    if args.show:
        for message in fuzzed:
            print(f"{message.kind:16} {dict(message.attributes) or ''} {message.body[:300]!r}")
        return 0
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        report = run(fuzzed, Path(folder))
    print(f"{args.messages} messages, seed {args.seed}, {report.seconds:.0f} seconds\n")
    show(report)
    return 1 if report.mistakes else 0


def show(report: Report) -> None:
    """The tally as a table, and all that is wrong."""
    tally = report.accounts.tally
    ends = sorted({end for _, end in tally})
    print(f"{'':16}", *(f"{end:>21}" for end in ends))
    for kind in KINDS:
        if any(tally[kind, end] for end in ends):
            print(f"{kind:16}", *(f"{tally[kind, end]:21}" for end in ends))
    print(f"{'all':16}", *(f"{sum(tally[kind, end] for kind in KINDS):21}" for end in ends), "\n")
    print(
        "rows:",
        ", ".join(f"{code or 'completed'} {count}" for code, count in report.accounts.rows.most_common()),
    )
    print("log:", ", ".join(f"{text} {count}" for text, count in Counter(report.said).most_common()))
    print(*report.mistakes or ["nothing is missing"], sep="\n")


if __name__ == "__main__":
    sys.exit(main())
