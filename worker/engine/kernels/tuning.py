"""Fits LoRA on a GPU to the device at hand, by timing; what was found is kept in a file.

How a launch is cut changes how its sums are rounded. Workers that share the file agree once all of it is
known, and so do the worker that stops and the one that starts in its place.
"""

import fcntl
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import torch
import triton
from triton.errors import TritonError

from worker.engine.kernels.lora import GENERATION
from worker.engine.kernels.tilings import (
    Fit,
    Situation,
    Tiling,
    Tuner,
    Work,
    default_tiling,
    expands_to_try,
    is_sound,
    shrinks_to_try,
    work_of,
)
from worker.engine.kernels.trial import Launch, Trial

logger = logging.getLogger(__name__)

_WORTH = 0.97
"""Another tiling is taken when it needs at most this much of the default's time: less is noise."""
_FEWEST_DENSE = 64
"""Runs of fewer tokens always go by the kernels."""


class Known(msgspec.Struct, kw_only=True):
    """What was found for one device: the file's content."""

    tilings: dict[str, Tiling] = {}
    """By the work, `_name_of` it."""
    dense_from: dict[str, int | None] = {}
    """By all the works of an engine's chunks."""


class Timer(Protocol):
    """How long a launch takes, in seconds."""

    def replayed(self, launch: Launch) -> float:
        """As a part of a captured graph: the host has no part in it."""

    def launched(self, launch: Launch) -> float:
        """By the host, as steps with chunks do it."""


class CudaTimer(Timer):
    """By events on the device, with Triton's own benchmarking."""

    def replayed(self, launch: Launch) -> float:
        """See Timer."""
        milliseconds: float = triton.testing.do_bench_cudagraph(launch, rep=10, return_mode="min")
        return milliseconds / 1000

    def launched(self, launch: Launch) -> float:
        """See Timer."""
        milliseconds: float = triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
        return milliseconds / 1000


class TimingTuner(Tuner):
    """Times what is not known yet, for `seconds` at most: a tiling is compiled before it is timed."""

    def __init__(
        self,
        timer: Timer,
        seconds: float,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`file` is the device's own; see `device_file`. None keeps nothing."""
        self._timer = timer
        self._seconds = seconds
        self._file = file
        self._clock = clock

    @torch.inference_mode()
    def tune(self, situation: Situation) -> Fit:
        """See Tuner. What there was no time or no memory for is left at its default.

        Workers that share the file tune one after the other, so that each knows what the others found.
        """
        with _alone(self._file):
            known = Known() if self._file is None else _read(self._file)
            before = msgspec.json.encode(known)
            started = self._clock()
            try:
                self._find_out(situation, known, started + self._seconds)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory to tune kernels in", extra={"reason": str(error)})
            fit = _fit(situation, known)
            if msgspec.json.encode(known) != before:
                seconds = round(self._clock() - started, 1)
                logger.info("kernels tuned", extra={"seconds": seconds, "dense_from": fit.dense_from})
                self._keep(known)
        return fit

    def _find_out(self, situation: Situation, known: Known, deadline: float) -> None:
        """Add to `known` what is not in it, as long as there is time."""
        counts = Counter(situation.projections)
        for capacity, time_it in (
            (situation.decode_tokens, self._timer.replayed),
            (situation.chunk_tokens, self._timer.launched),
        ):
            for dimensions in counts:
                name = _name_of(work_of(dimensions, capacity, situation), situation)
                if name not in known.tilings and self._clock() < deadline:
                    best = self._best(Trial(dimensions, capacity, situation), time_it, deadline)
                    if best is not None:
                        known.tilings[name] = best
        kind = _kind_of(situation)
        if kind is not None and kind not in known.dense_from and self._clock() < deadline:
            tilings = _fit(situation, known).tilings
            trials = [(Trial(one, situation.chunk_tokens, situation), count) for one, count in counts.items()]
            known.dense_from[kind] = self._dense_from(trials, tilings)

    def _best(self, trial: Trial, time_it: Callable[[Launch], float], deadline: float) -> Tiling | None:
        """Shrink first, then expand: each has sizes of its own. None when there was no time for all."""
        best = self._fastest(trial, shrinks_to_try(trial.work), time_it, deadline)
        return None if best is None else self._fastest(trial, expands_to_try(best), time_it, deadline)

    def _fastest(
        self, trial: Trial, tilings: Sequence[Tiling], time_it: Callable[[Launch], float], deadline: float
    ) -> Tiling | None:
        """The first, unless another one is clearly faster."""
        best, bound = tilings[0], _WORTH * self._seconds_of(trial, tilings[0], time_it)
        for tiling in tilings[1:]:
            if self._clock() >= deadline:
                return None
            seconds = self._seconds_of(trial, tiling, time_it)
            if seconds < bound:
                best, bound = tiling, seconds
        return best

    def _seconds_of(self, trial: Trial, tiling: Tiling, time_it: Callable[[Launch], float]) -> float:
        try:
            return time_it(trial.kernels(tiling))
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError) as error:  # more registers or shared memory than there are
            logger.debug("a tiling does not fit the device", extra={"tiling": tiling, "reason": str(error)})
            return math.inf

    def _dense_from(self, trials: Sequence[tuple[Trial, int]], tilings: dict[Work, Tiling]) -> int | None:
        """Halve the tokens while dense products take no longer than what these add to the kernels' time."""

        def kernels(tokens: int) -> float:
            return sum(
                count * self._timer.launched(trial.kernels(tilings[trial.work], [(0, 0, tokens)]))
                for trial, count in trials
            )

        least, tokens = None, trials[0][0].tokens
        idle = kernels(0)
        while tokens >= _FEWEST_DENSE:
            dense = sum(count * self._timer.launched(trial.products(tokens)) for trial, count in trials)
            if dense > kernels(tokens) - idle:
                break
            least, tokens = tokens, tokens // 2
        return least

    def _keep(self, known: Known) -> None:
        if self._file is None:
            return
        fresh = self._file.with_name(f"{self._file.name}.{time.time_ns()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=1))
            fresh.replace(self._file)
        except OSError as error:
            logger.warning("cannot keep how kernels were tuned", extra={"reason": str(error)})


def device_file(folder: Path, device: torch.device) -> Path:
    """Where in `folder` what suits `device` is kept, with these versions of what compiles for it."""
    versions = f"triton {triton.__version__} torch {torch.__version__} kernels {GENERATION}"
    name = f"{torch.cuda.get_device_name(device)} {versions}"
    return folder / "kernels" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"


def _fit(situation: Situation, known: Known) -> Fit:
    """What is known, and defaults."""
    tilings = {}
    for capacity in (situation.decode_tokens, situation.chunk_tokens):
        for dimensions in situation.projections:
            work = work_of(dimensions, capacity, situation)
            tilings[work] = known.tilings.get(_name_of(work, situation)) or default_tiling(work)
    kind = _kind_of(situation)
    return Fit(tilings, None if kind is None else known.dense_from.get(kind))


def _kind_of(situation: Situation) -> str | None:
    """By what dense products are known; None where they are no choice, as their factors are of two types."""
    if not situation.projections or situation.dtype != situation.lora_dtype:
        return None
    counts = Counter(work_of(one, situation.chunk_tokens, situation) for one in situation.projections)
    return " ".join(sorted(f"{count}*{_name_of(work, situation)}" for work, count in counts.items()))


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """While no other process tunes by the same file, where the folder can be written."""
    if file is None:
        yield
        return
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_name(f"{file.name}.lock").open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # for as long as the others may take to tune
        except OSError as error:
            logger.warning("workers may tune their kernels differently", extra={"reason": str(error)})
        yield


def _name_of(work: Work, situation: Situation) -> str:
    """All that a tiling may depend on, but the device."""
    outs = "+".join(map(str, work.out_features))
    types = f"{situation.dtype} {situation.lora_dtype}".replace("torch.", "")
    sizes = f"rank {work.max_rank}, {work.max_tokens} tokens, {situation.max_loras} slots"
    return f"{work.in_features} to {outs}, {sizes}, {types}"


def _read(file: Path) -> Known:
    try:
        known = msgspec.json.decode(file.read_bytes(), type=Known)
    except FileNotFoundError:
        return Known()
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("cannot read how kernels were tuned", extra={"file": str(file), "reason": str(error)})
        return Known()
    sound = {name: tiling for name, tiling in known.tilings.items() if is_sound(tiling)}
    if len(sound) < len(known.tilings):
        logger.warning("some of how kernels were tuned makes no sense", extra={"file": str(file)})
    return Known(tilings=sound, dense_from=known.dense_from)
