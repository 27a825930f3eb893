"""What it takes to load an adapter of the demo's model, with few and with many there already.

    python -m tests.benchmarks.loading [--adapters 200] [--peft-adapters 40] [--rank 8] [--targets all]

Ours reads, checks and scales the file into host memory (LoRAStore), which keeps the last 16 of them: memory
that a machine touches for the first time is slow on many of them, whoever asks for it. What all of them take
is measured after that, and then each is put into a slot. PEFT's is
`load_adapter`, with `low_cpu_mem_usage`; its time grows with every adapter, so it gets fewer. "reading" is
the safetensors file alone, read and parsed from bytes. Every figure is the median of five adapters in a row.
Exit status 1 when ours grows with the number, takes more than three times reading, or more host memory than
1.2 times the files.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import machine, workload
from tests.benchmarks.adapters import write_adapters
from tests.benchmarks.sides import quiet
from tests.benchmarks.workload import Settings

_AT_ONCE = 5
_RESIDENT = 16
_MAX_GROWTH, _MAX_OVER_READING, _MAX_MEMORY = 1.3, 3.0, 1.2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workload.add_options(parser)
    parser.set_defaults(adapters=200)
    parser.add_argument("--peft-adapters", type=workload.positive, default=40, metavar="N")
    args = parser.parse_args()
    quiet()
    settings = Settings.of(vars(args) | {"base": args.base or workload.demo_base_model(_say)})
    if min(args.adapters, args.peft_adapters) < 2 * _AT_ONCE:
        parser.error(f"--adapters and --peft-adapters: at least {2 * _AT_ONCE} are needed")
    with tempfile.TemporaryDirectory(prefix="loramill-benchmark-") as folder:
        _say(f"writing {settings.adapters} adapters")
        paths = write_adapters(Path(folder), settings)
        files_mib = sum((path / "adapter_model.safetensors").stat().st_size for path in paths) / 2**20
        reading = _times(paths, _read)
        ours, put, memory = _ours(settings, paths)
        _say("ours is done; PEFT takes longer")
        peft = _peft(settings, paths[: args.peft_adapters])
    _show(settings, reading, ours, put, peft, memory / files_mib)
    growth, over = _last(ours) / _first(ours), _last(ours) / _last(reading)
    held = growth <= _MAX_GROWTH and over <= _MAX_OVER_READING and memory <= _MAX_MEMORY * files_mib
    return 0 if held else 1


def _times(paths: Sequence[Path], load: Callable[[Path], object]) -> list[float]:
    taken = []
    for path in paths:
        started = time.perf_counter()
        load(path)
        taken.append(time.perf_counter() - started)
    return taken


def _read(path: Path) -> dict[str, Any]:
    import safetensors.torch

    return safetensors.torch.load((path / "adapter_model.safetensors").read_bytes())


def _ours(settings: Settings, paths: list[Path]) -> tuple[list[float], list[float], float]:
    """Seconds of each load and of each put into one of the slots, and the MiB all loads together took."""
    import torch

    from tests.engine.harness import Harness
    from worker.engine.adapters.loader import AdapterLoader
    from worker.engine.lora_store import LoRAStore
    from worker.jobs import AdapterKey

    harness = Harness(
        settings.base, max_num_seqs=4, max_num_batched_tokens=64, max_loras=8, max_lora_rank=settings.rank
    )
    loader = AdapterLoader(harness.runner.targets, max_lora_rank=settings.rank, dtype=torch.float32)
    keys = [AdapterKey(path.name, "1") for path in paths]

    def load(store: LoRAStore, path: Path) -> None:
        key = AdapterKey(path.name, "1")
        store.reserve(key)
        store.load(key, path)
        store.release(key)

    loads = _times(paths, partial(load, LoRAStore(loader, _RESIDENT)))
    store = LoRAStore(loader, len(paths))
    before = machine.resident_mib()
    for path in paths:
        load(store, path)
    memory = machine.resident_mib() - before
    puts = []
    for number, key in enumerate(keys):
        started = time.perf_counter()
        harness.runner.put_adapter(number % 8, store.weights(key))
        puts.append(time.perf_counter() - started)
    return loads, puts, memory


def _peft(settings: Settings, paths: list[Path]) -> list[float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.float32)
    started = time.perf_counter()
    model = PeftModel.from_pretrained(base, paths[0], adapter_name=paths[0].name)
    first = time.perf_counter() - started
    load = partial(model.load_adapter, low_cpu_mem_usage=True)
    return [first, *_times(paths[1:], lambda path: load(path, adapter_name=path.name))]


def _first(taken: Sequence[float]) -> float:
    """The second adapter and those after it: the first pays for imports."""
    return statistics.median(taken[1 : 1 + _AT_ONCE])


def _last(taken: Sequence[float]) -> float:
    return statistics.median(taken[-_AT_ONCE:])


def _show(
    settings: Settings,
    reading: list[float],
    ours: list[float],
    put: list[float],
    peft: list[float],
    memory: float,
) -> None:
    described = machine.describe()
    print(
        f"{settings.base.name}, rank {settings.rank}, {settings.targets} modules; {described['processor']}, "
        f"{described['cores']} cores, peft {described['versions']['peft']}"
    )
    rows = {"reading": reading, "ours": ours, "ours, into a slot": put, "PEFT load_adapter": peft}
    print(f"{'':<20}{'adapters':>10}{'2nd ms':>10}{'last ms':>10}{'grows by':>10}")
    for name, taken in rows.items():
        first, last = _first(taken), _last(taken)
        print(f"{name:<20}{len(taken):>10}{1e3 * first:>10.1f}{1e3 * last:>10.1f}{last / first:>9.2f}x")
    print(f"ours over reading: {_last(ours) / _last(reading):.2f}x (at most {_MAX_OVER_READING:g})")
    print(f"growth of ours: {_last(ours) / _first(ours):.2f}x (at most {_MAX_GROWTH:g})")
    print(f"PEFT over ours: {_first(peft) / _first(ours):.0f}x at the 2nd, ", end="")
    print(f"{_last(peft) / _last(ours):.0f}x at PEFT's {len(peft)}th and our {len(ours)}th")
    print(f"host memory over the files' size: {memory:.2f}x (at most {_MAX_MEMORY:g})")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
