"""What merging an adapter gains: steps with one adapter, merged and not, and the base model's own.

    python -m tests.benchmarks.merged [--rows 1 4 16] [--rank 8] [--steps 40] [--rounds 5]

Three engines over the demo's model take turns, and each figure is the median of the rounds: the base without
an adapter, the same adapter in all rows unmerged, and merged. Prompts have 64 tokens; what is timed are the
steps after them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import transformers

from tests.benchmarks import workload
from tests.benchmarks.adapters import write_adapters
from tests.engine.harness import Harness
from worker.engine.merging import LoRAMode
from worker.jobs import AdapterKey, InferenceRequest, SamplingParams

SIDES = {"base": LoRAMode.UNMERGED, "unmerged": LoRAMode.UNMERGED, "merged": LoRAMode.MERGED}
_WIDTH = 20
PROMPT = tuple(range(1000, 1064))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--base", type=Path, help="a folder; default: the demo's model")
    cli.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    cli.add_argument("--rank", type=int, default=8)
    cli.add_argument("--steps", type=int, default=40)
    cli.add_argument("--rounds", type=int, default=5)
    args = cli.parse_args()
    transformers.utils.logging.disable_progress_bar()
    settings = workload.Settings(args.base or workload.demo_base_model(print), adapters=1, rank=args.rank)
    with tempfile.TemporaryDirectory() as folder:
        (adapter,) = write_adapters(Path(folder), settings)
        harnesses, keys = {}, {}
        for side, mode in SIDES.items():
            harnesses[side] = Harness(
                settings.base,
                max_num_seqs=max(args.rows),
                max_model_len=512,
                lora_mode=mode,
                prefix_reuse=False,
            )
            keys[side] = None if side == "base" else harnesses[side].adapter(adapter)
    print(f"seconds a step of {args.steps}, median of {args.rounds} rounds, rank {args.rank}")
    print(
        f"{'rows':>6}{'base':>10}{'unmerged':>10}{'merged':>10}{'unmerged / merged':>20}{'merged / base':>16}"
    )
    for rows in args.rows:
        took: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, harness in harnesses.items():
                took[side].append(seconds_a_step(harness, keys[side], rows, args.steps))
        base, unmerged, merged = (statistics.median(took[side]) for side in SIDES)
        figures = [f"{one:.4f}" for one in (base, unmerged, merged)]
        figures += [f"{one:.2f}" for one in (unmerged / merged, merged / base)]
        print(f"{rows:>6}" + "".join(f"{figure:>{_WIDTH}}" for figure in figures))


def seconds_a_step(harness: Harness, key: AdapterKey | None, rows: int, steps: int) -> float:
    """Of steps in which all rows decode; the adapter is merged before them, where it is."""
    params = SamplingParams(max_new_tokens=steps + 2 * rows + 8, ignore_eos=True)
    for row in range(rows):
        harness.engine.add(InferenceRequest(id=str(row), prompt=PROMPT, adapter=key, params=params))
    while True:
        _, stats = harness.engine.step()
        if stats.rows == rows and not stats.prompt_tokens:
            break
    started = time.perf_counter()
    for _ in range(steps):
        _, stats = harness.engine.step()
        assert stats.rows == rows
    seconds = (time.perf_counter() - started) / steps
    while harness.engine.has_work:
        harness.engine.step()
    return seconds


if __name__ == "__main__":
    main()
