"""What one call over HTTP takes while a large job runs, beside what it takes on an idle engine.

    python -m tests.benchmarks.interactive [--calls 30] [--new-tokens 16] [--hidden 256] [--layers 6]

The base model is random, with adapters of rank 8. The job's rows have as many adapters as there are, more
than fit the slots or host memory, long prompts and long answers: places, slots, host memory and the tokens
of a step are all taken. Each call has an adapter too, another one each time. The seconds of a step with and
without calls are told beside: a call should take a few of them, and one for each of its tokens.
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import tiny
from tests.benchmarks import machine, mirror
from tests.glue.calling import Worker, calling, make_core

_ADAPTERS = 8
_LENGTH = 768


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--calls", type=mirror.positive, default=30)
    cli.add_argument("--new-tokens", type=mirror.positive, default=16)
    cli.add_argument("--hidden", type=mirror.positive, default=256)
    cli.add_argument("--layers", type=mirror.positive, default=6)
    cli.add_argument("--batch", type=mirror.positive, default=16)
    cli.add_argument("--batched-tokens", type=mirror.positive, default=512)
    return cli


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    logging.getLogger("worker").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(args, Path(folder)))
    print(json.dumps(figures | {"machine": machine.describe()}, indent=2))
    return 0


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    base = tiny.make_base(
        folder / "base",
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 2,
        num_hidden_layers=args.layers,
        max_position_embeddings=_LENGTH,
    )
    for number in range(_ADAPTERS):
        path = folder / "adapters" / f"a{number}"
        tiny.make_adapter(path, base, seed=number, r=8, target_modules=tiny.ATTENTION)
    limits = {"max_loras": 4, "max_cpu_loras": 4, "max_num_seqs": args.batch}
    core = make_core(base, **limits, max_num_batched_tokens=args.batched_tokens)
    async with calling(core, folder / "adapters", folder, in_flight_rows=4 * args.batch) as worker:
        await timed_calls(worker, args, 3)  # to warm it up
        idle, _ = await timed_calls(worker, args, args.calls)
        job = asyncio.create_task(endless_job(worker))
        await step_seconds(worker)  # until it is at full steam
        alone = await step_seconds(worker)
        busy, steps = await timed_calls(worker, args, args.calls)
        assert not job.done()
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        preempted = core.engine._scheduler.num_preempted
    return {
        "idle": told(idle),
        "beside a job": told(busy),
        "ratio": {name: round(told(busy)[name] / told(idle)[name], 2) for name in ("p50", "p95")},
        "mean seconds of a step of the job alone": round(alone, 4),
        "steps of a call beside a job": {"p50": statistics.median(steps), "most": max(steps)},
        "tokens of a call": args.new_tokens,
        "rows preempted": preempted,
    }


async def timed_calls(
    worker: Worker, args: argparse.Namespace, count: int
) -> tuple[list[float], list[float]]:
    """Seconds of each of so many calls, one after the other, and steps of the engine meanwhile."""
    took, steps = [], []
    for number in range(count):
        parameters = {"max_new_tokens": args.new_tokens, "ignore_eos": True}
        body = {
            "inputs": f"Who is it? {number}",
            "adapters": f"a{number % _ADAPTERS}",
            "parameters": parameters,
        }
        before = worker.metric("loramill_batch_rows_count")
        started = time.perf_counter()
        answer = await worker.invoke(body)
        took.append(time.perf_counter() - started)
        steps.append(worker.metric("loramill_batch_rows_count") - before)
        assert answer.status == 200, answer.body
    return took, steps


async def endless_job(worker: Worker) -> None:
    """Rows with prompts of 400 tokens, as many as may be at work."""
    inputs = [f"{number:04} " * 80 for number in range(48)]
    adapters = [f"a{number % _ADAPTERS}" for number in range(48)]
    parameters = {"max_new_tokens": 200, "ignore_eos": True}

    async def jobs() -> None:
        while True:
            await worker.job(inputs, adapters=adapters, parameters=parameters)

    await asyncio.gather(*(jobs() for _ in range(4)))


async def step_seconds(worker: Worker, seconds: float = 10.0) -> float:
    """The mean of a while."""
    counted = [(worker.metric("loramill_step_seconds_total"), worker.metric("loramill_batch_rows_count"))]
    await asyncio.sleep(seconds)
    counted += [(worker.metric("loramill_step_seconds_total"), worker.metric("loramill_batch_rows_count"))]
    (before, steps_before), (after, steps) = counted
    return (after - before) / (steps - steps_before)


def told(took: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(took, n=20, method="inclusive")
    return {"p50": round(statistics.median(took), 4), "p95": round(cuts[-1], 4), "most": round(max(took), 4)}


if __name__ == "__main__":
    sys.exit(main())
