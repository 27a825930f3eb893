"""Starts the other ranks of a model, each a process of this machine, and ends them."""

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from worker.child import child_command
from worker.engine.base_model import BaseModel
from worker.engine.kernels.tilings import Tuner
from worker.engine.lora_plan import Costs
from worker.engine.model_runner import ModelRunner
from worker.engine.parallel import orders
from worker.engine.parallel.build import build_runner, device_of, load, lora_dtype_of
from worker.engine.parallel.channel import Channel
from worker.engine.parallel.cuts import Rank
from worker.engine.parallel.group import Group, ProcessGroup
from worker.engine.parallel.leader import Followers, LeadingExecutor, LeadingTuner, Processes, first_failure
from worker.errors import EngineFailed, ModelError

_MODULE = "worker.engine.parallel.follower"
_STDERR = 2
"""What this process prints may be read by somebody."""
_END_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0


def start(
    setup: orders.Setup,
    *,
    tuner: Tuner | None = None,
    measure: Callable[[torch.dtype], Costs] | None = None,
) -> tuple[BaseModel, ModelRunner]:
    """Load a model with `setup.degree` processes, this one being rank 0. Blocking; minutes.

    `tuner` and `measure` are for LoRA on a GPU and on a CPU; what rank 0 finds holds for all.

    `ModelRunner.close` ends the others, and so does the end of this process, in whatever way. One such model
    at a time in a process. Raises ModelError.
    """
    device_of(setup.device, setup.degree, 0)
    ranks = _Ranks(setup)
    try:
        return ranks.build(tuner, measure)
    except BaseException as exc:
        # A rank that failed leaves the others to fail in its absence: its own words say why.
        asked = ranks.met and isinstance(exc, Exception)
        told = first_failure(ranks.followers, _LAST_WORDS_SECONDS) if asked else None
        ranks.close()
        if told is not None:
            raise ModelError(told) from exc
        if isinstance(exc, EngineFailed):
            raise ModelError(f"the base model cannot be shared: {exc}") from exc
        raise


class _Ranks(Processes):
    """The processes of ranks 1 and up, and what this one needs to work with them."""

    def __init__(self, setup: orders.Setup) -> None:
        self._setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="loramill-", ignore_cleanup_errors=True)
        self._place = Path(self._folder.name) / "ranks"
        """Where they meet; torch may look there later, too."""
        self._threads = torch.get_num_threads()
        self._each = max(1, self._threads // setup.degree)
        self._group: Group | None = None
        self._lost: str | None = None
        self._closing = False
        # Nobody writes to it. When this process ends, the system closes it, and the others end.
        life, self._life = os.pipe()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        for _ in range(1, setup.degree):
            own, other = socket.socketpair()
            self._channels.append(Channel(own, setup.step_seconds))
            self._processes.append(
                subprocess.Popen(  # noqa: S603 (it is this program)
                    child_command(_MODULE, other.fileno(), life),
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    pass_fds=(other.fileno(), life),
                )
            )
            other.close()
        os.close(life)
        self.followers = Followers(self._channels)
        self.met = False
        """Whether one that fails makes others fail."""

    def build(
        self, tuner: Tuner | None, measure: Callable[[torch.dtype], Costs] | None
    ) -> tuple[BaseModel, ModelRunner]:
        """Rank 0's part of it, and the others'."""
        setup, followers = self._setup, self.followers
        for rank in followers.ranks:  # one after the other: each may need memory for the whole model
            begin = orders.Begin(setup, rank, self._each, str(self._place))
            followers.send(rank, orders.encode(begin))
            _expect([followers.answer(rank, setup.load_seconds)], orders.Loaded, rank)
        torch.set_num_threads(self._each)
        base, share = load(setup, own := Rank(0, setup.degree))
        costs = None if measure is None else measure(lora_dtype_of(setup, base))
        followers.tell(orders.Meet(costs))
        self.met = True
        share.group = self._group = ProcessGroup(own, base.device, self._place, setup.step_seconds)
        for rank, process in enumerate(self._processes, start=1):
            name = f"rank-{rank}"
            threading.Thread(target=self._watch, args=(rank, process), name=name, daemon=True).start()
        runner = build_runner(setup, base, share, LeadingTuner(tuner, followers), costs)
        _expect(followers.answers(setup.step_seconds), orders.Done)
        runner.lead(
            lambda own: LeadingExecutor(
                own,
                share,
                followers,
                self,
                step_seconds=setup.step_seconds,
                settle_seconds=setup.settle_seconds,
            )
        )
        return base, runner

    def check(self) -> None:
        """See Processes."""
        if self._lost is not None:
            raise EngineFailed(self._lost)

    def close(self) -> None:
        """See Processes. May be called again."""
        if self._closing:
            return
        self._closing = True
        for channel in self._channels:
            channel.close()
        os.close(self._life)
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._group is not None:
            self._group.close()
        self._folder.cleanup()
        torch.set_num_threads(self._threads)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a process, in a thread of its own."""
        code = process.wait()
        if not self._closing:
            self._lost = f"rank {rank} of the model has ended, with exit code {code}"
            if self._group is not None:
                self._group.abort()


def _expect(answers: Sequence[orders.Answer], kind: type, first: int = 1) -> None:
    for rank, answer in enumerate(answers, start=first):
        if isinstance(answer, orders.Failed):
            raise ModelError(f"rank {rank}: {answer.message}")
        assert isinstance(answer, kind), answer
