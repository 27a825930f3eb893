"""What is compared: each side loads the model and the adapters in its own way and runs the same requests.

    python -m tests.benchmarks.sides ours-mixed [--dtype float32] [--rows 64] ...

runs one side by itself and prints one JSON line; the benchmark runs each in a process of its own. All are
warm when the clock starts, decode greedily, and give every row exactly the number of tokens it asks for:
nobody stops at an end-of-sequence token. Only tokens that a row asked for count.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.benchmarks import workload
from tests.benchmarks.adapters import write_adapters
from tests.benchmarks.machine import peak_mib
from tests.benchmarks.workload import Request, Settings

DTYPES = ("float32", "bfloat16")
_TIMEOUT_SECONDS = 7200
_TUNING_SECONDS = 300


class SideFailed(Exception):
    pass


@dataclass
class Timed:
    """What a run of requests took and gave."""

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By the request's number."""
    details: dict[str, Any] = field(default_factory=dict)


class Ours:
    """Our engine: `max_num_seqs` is the batch of the others, and so is `max_loras` if nothing else is said.
    It knows no length ahead.

    `prefill_seconds` are those of steps that carry prompt tokens; rows that decode ride along in them.
    """

    def __init__(self, settings: Settings, dtype: str, adapters: list[Path], **engine: Any) -> None:
        from tests.engine.harness import Harness

        known = inspect.signature(Harness.__init__).parameters
        options = {"max_loras": settings.batch, "tuner": _tuner(settings)} | engine
        self._engine_options = {name: value for name, value in options.items() if name in known}
        self._batch = settings.batch
        self._harness = Harness(
            settings.base,
            max_num_seqs=settings.batch,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_lora_rank=settings.rank,
            max_model_len=settings.max_model_len,
            dtype=dtype,
            device=settings.device,
            **self._engine_options,
        )
        self._keys = [self._harness.adapter(path) for path in adapters]

    def warm(self, requests: list[Request]) -> None:
        self.run(requests)

    def run(self, requests: list[Request]) -> Timed:
        from worker.jobs import InferenceRequest, SamplingParams

        taken = [
            InferenceRequest(
                id=str(request.number),
                prompt=request.prompt,
                adapter=self._keys[request.adapter] if self._keys else None,
                params=SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True),
            )
            for request in requests
        ]
        self._harness.stats.clear()
        begun = time.perf_counter()
        done = self._harness.run(taken)
        timed = Timed(seconds=time.perf_counter() - begun)
        failures = [done[row.id].failure for row in taken if done[row.id].failure]
        assert not failures, failures[0]
        timed.tokens = {request.number: list(done[str(request.number)].token_ids) for request in requests}
        full_steps = []
        for stats in self._harness.stats:
            seconds = sum(value for name, value in stats._asdict().items() if name.endswith("_seconds"))
            if stats.prompt_tokens:
                timed.prefill_seconds += seconds
            else:
                timed.decode_seconds += seconds
                full_steps += [seconds] if stats.rows == self._batch else []
        timed.details = self._engine_options | {
            "steps": len(self._harness.stats),
            "full_decode_step_seconds": statistics.median(full_steps) if full_steps else None,
        }
        return timed


class Static:
    """transformers' `generate` on the base model: batches in arrival order, padded on the left.

    A batch runs until its longest row has its tokens; what the others get beyond their own is dropped.
    """

    def __init__(self, settings: Settings, dtype: str, adapters: list[Path]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._batch = settings.batch
        self._device = settings.device
        self._details: dict[str, Any] = {}
        base: Any = AutoModelForCausalLM.from_pretrained(settings.base, dtype=getattr(torch, dtype))
        self._model = self._adapt(base.to(settings.device), adapters).eval()

    def warm(self, requests: list[Request]) -> None:
        self.run(requests)

    def run(self, requests: list[Request]) -> Timed:
        timed = Timed(details=self._details)
        begun = time.perf_counter()
        for batch in self._batches(requests):
            self._generate(batch, timed)
        timed.seconds = time.perf_counter() - begun
        timed.decode_seconds = timed.seconds - timed.prefill_seconds
        return timed

    def _adapt(self, base: Any, adapters: list[Path]) -> Any:
        return base

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        for start in range(0, len(requests), self._batch):
            yield requests[start : start + self._batch]

    def _options(self, batch: list[Request]) -> dict[str, Any]:
        return {}

    def _generate(self, batch: list[Request], timed: Timed) -> None:
        import torch

        begun = time.perf_counter()

        def note_prefill(_ids: Any, scores: Any) -> Any:
            """Called with the logits of every step: the first call ends the prefill."""
            nonlocal begun
            if begun:
                timed.prefill_seconds += time.perf_counter() - begun
                begun = 0.0
            return scores

        longest = max(len(request.prompt) for request in batch)
        new_tokens = max(request.new_tokens for request in batch)
        gaps = [longest - len(request.prompt) for request in batch]
        ids = [[0] * gap + [*request.prompt] for gap, request in zip(gaps, batch, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(ids, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=[note_prefill],
                **self._options(batch),
            )
        answers = output[:, longest:].tolist()
        for request, answer in zip(batch, answers, strict=True):
            assert len(answer) == new_tokens, "generate stopped early"
            timed.tokens[request.number] = answer[: request.new_tokens]


class PeftMixed(Static):
    """PEFT's own mixed batches: `generate(adapter_names=[...])`, batches in arrival order."""

    def warm(self, requests: list[Request]) -> None:
        """Warm up, and keep the adapters in whichever type is faster: PEFT's own choice is float32."""
        types = {str(parameter.dtype): parameter.dtype for parameter in self._model.parameters()}
        seconds = {}
        for name, dtype in types.items():
            self._cast_adapters(dtype)
            self.run(requests)
            seconds[name] = self.run(requests).seconds
        fastest = min(seconds, key=lambda name: seconds[name])
        self._cast_adapters(types[fastest])
        self._details = {"adapters_in": fastest.removeprefix("torch."), "trial_seconds": seconds}

    def _adapt(self, base: Any, adapters: list[Path]) -> Any:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, adapters[0], adapter_name=adapters[0].name)
        for path in adapters[1:]:
            model.load_adapter(path, adapter_name=path.name, low_cpu_mem_usage=True)
        self._names = [path.name for path in adapters]
        return model

    def _options(self, batch: list[Request]) -> dict[str, Any]:
        return {"adapter_names": [self._names[request.adapter] for request in batch]}

    def _cast_adapters(self, dtype: Any) -> None:
        for name, parameter in self._model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)


class PeftSorted(PeftMixed):
    """The same with an oracle: batches of rows whose answers are about as long, known ahead."""

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        yield from super()._batches(sorted(requests, key=lambda request: request.new_tokens))


class PeftSwitching(PeftMixed):
    """One adapter at a time with `set_adapter`: its rows together, by an oracle of their answers' length."""

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        ordered = sorted(requests, key=lambda request: (request.adapter, request.new_tokens))
        for adapter, rows in groupby(ordered, key=lambda request: request.adapter):
            yield from self._with_adapter(self._names[adapter], list(rows))

    def _with_adapter(self, name: str, rows: list[Request]) -> Iterator[list[Request]]:
        self._model.set_adapter(name)
        yield from super()._batches(rows)

    def _options(self, batch: list[Request]) -> dict[str, Any]:
        return {}


class PeftMerged(PeftSwitching):
    """One adapter at a time, merged into the base model for its rows and unmerged after them."""

    def _with_adapter(self, name: str, rows: list[Request]) -> Iterator[list[Request]]:
        self._model.base_model.merge_adapter([name])
        yield from Static._batches(self, rows)
        self._model.base_model.unmerge_adapter()


@dataclass(frozen=True)
class Kind:
    """A side by name: how it runs, which requests, and how many of the adapters it loads."""

    run: Callable[..., Any]
    adapters: int | None = None
    """None is all of them."""
    prefixed: bool = False
    times_rows: int = 1
    """As many rows as the settings say, times this."""


_FEW_SLOTS = 8
KINDS = {
    "ours-mixed": Kind(Ours),
    "ours-base": Kind(Ours, adapters=0),
    "ours-one": Kind(Ours, adapters=1),
    "ours-untuned": Kind(partial(Ours, tuner=None)),
    "ours-prefix-reused": Kind(partial(Ours, prefix_reuse=True), prefixed=True),
    "ours-prefix-repeated": Kind(partial(Ours, prefix_reuse=False), prefixed=True),
    "ours-few-slots": Kind(partial(Ours, max_loras=_FEW_SLOTS), times_rows=2),
    "ours-all-in-slots": Kind(partial(Ours, max_loras=_FEW_SLOTS), adapters=_FEW_SLOTS, times_rows=2),
    "transformers-base": Kind(Static, adapters=0),
    "peft-mixed": Kind(PeftMixed),
    "peft-switching": Kind(PeftSwitching),
    "peft-sorted": Kind(PeftSorted),
    "peft-merged": Kind(PeftMerged),
}


def measure(name: str, dtype: str, settings: Settings, adapters: list[Path]) -> dict[str, Any]:
    """Load one side, warm it, run the job. Start-up is imports, the model and the adapters."""
    started = time.perf_counter()
    import torch
    from transformers import AutoTokenizer

    if settings.threads:
        torch.set_num_threads(settings.threads)
    kind = KINDS[name]
    tokenizer = AutoTokenizer.from_pretrained(settings.base)
    make = workload.prefixed if kind.prefixed else workload.mixed
    made = make(tokenizer, settings, settings.rows * kind.times_rows)
    requests = _within(kind, made)
    side = kind.run(settings, dtype, adapters[: kind.adapters])
    ready = time.perf_counter()
    side.warm(_within(kind, workload.warm_up(tokenizer, settings)))
    timed = side.run(requests)
    generated = sum(map(len, timed.tokens.values()))
    assert generated == sum(request.new_tokens for request in requests)
    return {
        "side": name,
        "dtype": dtype,
        "rows": len(requests),
        "generated_tokens": generated,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "tokens_per_second": generated / timed.seconds,
        "seconds": timed.seconds,
        "prefill_seconds": timed.prefill_seconds,
        "decode_seconds": timed.decode_seconds,
        "startup_seconds": ready - started,
        "peak_mib": peak_mib(),
        "peak_device_mib": torch.cuda.max_memory_allocated() >> 20 if settings.device != "cpu" else None,
        "threads": torch.get_num_threads(),
        "requests": workload.digest(made),
        "details": timed.details,
        "tokens": [timed.tokens[number] for number in sorted(timed.tokens)],
    }


def _tuner(settings: Settings) -> Any:
    """As the worker has it on a GPU, but that nothing is kept."""
    if settings.device == "cpu":
        return None
    from worker.engine.kernels.tuning import CudaTimer, TimingTuner

    return TimingTuner(CudaTimer(), _TUNING_SECONDS)


def measure_apart(name: str, dtype: str, settings: Settings, adapters: Path) -> dict[str, Any]:
    """`measure` in a process of its own, tokens included. Raises SideFailed."""
    command = [sys.executable, "-m", __spec__.name, name, "--dtype", dtype, "--tokens"]
    command += ["--adapter-folder", str(adapters), *settings.arguments()]
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    try:
        done = subprocess.run(
            command,
            env=os.environ | threads,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SideFailed(f"{name} in {dtype} took more than {_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise SideFailed(f"{name} in {dtype} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _within(kind: Kind, requests: Iterable[Request]) -> list[Request]:
    """The requests as they are for a side that has fewer adapters."""
    if not kind.adapters:
        return list(requests)
    return [request._replace(adapter=request.adapter % kind.adapters) for request in requests]


def quiet() -> None:
    """Nothing here may reach for a model hub, or say more than the benchmark does."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.sides",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("side", choices=KINDS)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", action="store_true", help="print every row's tokens too")
    parser.add_argument(
        "--adapter-folder", type=Path, help="holds adapter0, adapter1, ... (default: made anew)"
    )
    workload.add_options(parser)
    args = parser.parse_args()
    quiet()
    if args.base is None:
        args.base = workload.demo_base_model(lambda line: print(line, file=sys.stderr))
    settings = Settings.of(args)
    try:
        settings.check()
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="loramill-benchmark-") as folder:
        if args.adapter_folder is None:
            adapters = write_adapters(Path(folder), settings)
        else:
            adapters = [args.adapter_folder / f"adapter{number}" for number in range(settings.adapters)]
        measured = measure(args.side, args.dtype, settings, adapters)
    if not args.tokens:
        del measured["tokens"]
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
