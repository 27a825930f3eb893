"""lm-evaluation-harness over the queue, beside its own back end.

    python -m tests.evaluation [--model FOLDER | --demo] [--adapters FOLDER ...]

Starts moto and a `loramill worker` with the model, a tiny random one unless it is said which. The harness,
which `pip install lm-eval` brings, evaluates the base model and each adapter on small tasks of our own, in
float32 on the CPU, once by its own back end and once over the queue. Prints how the two compare, and ends
with 1 if anything differs by more than rounding.

For the demo's model say `--tolerance 0.01`: after BOS alone its activations reach 25,000, where a step of
float32 is 0.002, and then a log-likelihood depends on the order in which products are added up.
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


import worker.demo
from tests import tiny
from tests.e2e.conftest import Mill
from tests.evaluation.compare import TOLERANCE, Evaluation, compare
from tests.evaluation.compare import worker as running_worker
from tests.sync import servers
from worker.demo.base_model import prepare_base_model


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = cli.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="a transformers folder")
    which.add_argument("--demo", action="store_true", help="the demo's model and its adapters")
    cli.add_argument("--adapters", type=Path, nargs="+", default=[], help="PEFT's folders, for --model")
    cli.add_argument("--max-length", type=int, default=160, help="most tokens that the model is given")
    cli.add_argument("--tolerance", type=float, default=TOLERANCE, help="between two log-likelihoods")
    cli.add_argument("--chat", action="store_true", help="put all contexts through the chat template")
    return cli


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base, adapters = _models(args, folder)
        mill = Mill(stack.enter_context(servers.moto_apart()), folder)
        queue_url = stack.enter_context(running_worker(mill, base, adapters, LORAMILL_MAX_LORA_RANK="64"))
        found = [
            compare(
                queue_url,
                base,
                adapter,
                folder / f"tasks-{number}",
                max_length=args.max_length,
                tolerance=args.tolerance,
                chat=args.chat,
            )
            for number, adapter in enumerate((None, *adapters.items()))
        ]
    print(table(found))
    return int(any(own.problems for own in found))


def table(found: list[Evaluation]) -> str:
    """Markdown, and below it every difference that is more than rounding."""
    lines = [
        "| adapter | task | documents | answers | greedy | metrics | largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in (task for own in found for task in own.tasks.values()):
        metrics = (f"{name.removesuffix(',none')} {value:.4g}" for name, value in task.metrics.items())
        cells = (
            task.adapter or "(base)",
            task.task,
            task.documents,
            len(task.ours),
            task.greedy,
            ", ".join(metrics),
            f"{task.worst:.1e}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    theirs = sum(own.theirs_seconds for own in found)
    ours = sum(own.ours_seconds for own in found)
    lines += ["", f"{theirs:.0f} seconds by its own back end, {ours:.0f} over the queue.", ""]
    return "\n".join([*lines, *(problem for own in found for problem in own.problems)])


def _models(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The base model, and its adapters by name."""
    if args.demo:
        base = prepare_base_model(Path.home() / ".cache" / "loramill", print)
        own = Path(worker.demo.__file__).parent / "adapters"
        return base, {path.name: path for path in sorted(own.iterdir()) if path.is_dir()}
    if args.model is not None:
        return args.model, {path.name: path for path in args.adapters}
    base = tiny.make_base(folder / "base", vocab_size=257)
    return base, {"any": tiny.make_adapter(folder / "any", base, seed=1, target_modules="all-linear")}


if __name__ == "__main__":
    sys.exit(main())
