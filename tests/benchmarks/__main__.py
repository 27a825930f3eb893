"""Ratios of tokens per second, this engine over others and over itself, each taken within one run.

    python -m tests.benchmarks [--rounds 3] [--only NAME ...] [--json FILE] [--draw FILE] [--markdown]

Every side runs once a round in a process of its own (see sides.py for what each does), and the order turns
from round to round, so that a slow phase of the machine hits all of them. A ratio is taken within a round;
the table has its median and its span. Exit status: 0 when every bound held, 1 when one did not or a side
failed, 2 when the arguments make no sense.
"""

import argparse
import importlib
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.benchmarks import machine, report, workload
from tests.benchmarks.adapters import write_adapters
from tests.benchmarks.report import BY_NAME, RATIOS, SIDES
from tests.benchmarks.sides import SideFailed, measure_apart, quiet
from tests.benchmarks.workload import Settings
from worker.errors import ModelError

_SUFFIXES = (".svg", ".png")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=report.COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=workload.positive, default=3, metavar="N")
    made.add_argument("--only", nargs="+", choices=BY_NAME, metavar="NAME", help=f"of {', '.join(BY_NAME)}")
    made.add_argument("--extra", action="store_true", help="also the ratios without a bound")
    made.add_argument(
        "--bf16-rows",
        type=workload.positive,
        default=32,
        metavar="N",
        help="rows of the bf16 sides (default 32)",
    )
    workload.add_options(made)
    made.add_argument("--json", type=Path, metavar="FILE", help="keep the results, after every round")
    made.add_argument(
        "--from", dest="saved", type=Path, metavar="FILE", help="measure nothing: show these results"
    )
    made.add_argument("--draw", type=Path, metavar="FILE", help="draw the ratios, as .svg or .png")
    made.add_argument("--markdown", action="store_true", help="print what stands in the README")
    return made


def main(argv: list[str] | None = None) -> int:
    cli = parser()
    args = cli.parse_args(argv)
    quiet()
    try:
        _check(args)
        result = _saved(args.saved) if args.saved else None
    except ValueError as error:
        cli.error(str(error))
    try:
        result = result or _run(args, cli)
        print(report.markdown(result) if args.markdown else report.text(result))
        if args.draw:
            report.draw(result, args.draw)
    except (SideFailed, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if any(measured.held is False for measured in report.judge(result)) else 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what would otherwise fail after an hour of measuring."""
    for option, path in (("--json", args.json), ("--draw", args.draw)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.absolute().parent}")
    if args.draw and args.draw.suffix not in _SUFFIXES:
        raise ValueError(f"--draw {args.draw}: the name has to end in {' or '.join(_SUFFIXES)}")
    if args.draw:
        try:
            importlib.import_module("matplotlib")
        except ImportError as error:
            raise ValueError(
                "--draw needs matplotlib, which is not there: pip install -e '.[test]'"
            ) from error
    Settings.of(vars(args) | {"base": args.base or "."}).check()


def _saved(path: Path) -> dict[str, Any]:
    """A result of an earlier `--json`. Raises ValueError when it is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        report.text(result)
    except OSError as error:
        raise ValueError(f"--from {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--from {path} is not a result that --json wrote: {error!r}") from error
    return result


def _run(args: argparse.Namespace, cli: argparse.ArgumentParser) -> dict[str, Any]:
    wanted = args.only or [ratio.name for ratio in RATIOS if args.extra or not ratio.extra]
    compared = {side for name in wanted for side in (BY_NAME[name].ours, BY_NAME[name].theirs)}
    sides = [side for side in SIDES if side in compared]
    settings = Settings.of(vars(args) | {"base": args.base or workload.demo_base_model(_say)})
    rounds: list[dict[str, Any]] = []
    result = {
        "options": _options(args, cli),
        "machine": machine.describe(),
        "settings": asdict(settings) | {"base": settings.base.name},
        "bf16_rows": args.bf16_rows,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory(prefix="loramill-benchmark-") as folder:
        _say(f"writing {settings.adapters} adapters")
        try:
            write_adapters(Path(folder), settings)
        except ValueError as error:
            raise SideFailed(str(error)) from error
        for number in range(args.rounds):
            first = number * len(sides) // args.rounds
            measured = {}
            for side in sides[first:] + sides[:first]:
                rows = args.bf16_rows if side.fewer_rows else settings.rows
                measured[side.key] = one = measure_apart(
                    side.kind, side.dtype, replace(settings, rows=rows), Path(folder)
                )
                figures = f"{one['tokens_per_second']:.1f} tokens/s in {one['seconds']:.1f} s"
                _say(f"round {number + 1} of {args.rounds}: {side.kind} {side.dtype}, {rows} rows: {figures}")
            rounds.append(measured)
            if args.json:
                args.json.write_text(json.dumps(result) + "\n")
    return result


def _options(args: argparse.Namespace, cli: argparse.ArgumentParser) -> list[str]:
    """The options that change what is measured, where they are not the defaults."""
    given: list[str] = []
    for action in cli._actions:
        value = getattr(args, action.dest, None)
        if action.dest in {"json", "saved", "draw", "markdown", "help"} or value in (
            action.default,
            None,
            False,
        ):
            continue
        if action.dest == "base":
            value = value.name
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        given += [action.option_strings[0], *map(str, values)]
    return given


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
