"""Several ranks of a model in one process, each in a thread: as fast as one, and with no process to start."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

from tests.engine.harness import Harness
from worker.engine.base_model import BaseModel
from worker.engine.cuts import Rank
from worker.engine.model_runner import ModelRunner
from worker.engine.parallel.channel import Channel
from worker.engine.parallel.follower import Follower, ToldTuner
from worker.engine.parallel.group import Group
from worker.engine.parallel.leader import Followers, LeadingExecutor, LeadingTuner, Processes
from worker.engine.parallel.share import Share
from worker.engine.proof import expect

TIMEOUT = 20.0


class Meeting:
    """Where the ranks of a `ThreadGroup` put what they have."""

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.barrier = threading.Barrier(degree, timeout=TIMEOUT)
        self.given: list[Any] = [None] * degree
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        """What rank 0 has called, with the shape of what it gave."""

    def groups(self) -> list["ThreadGroup"]:
        return [ThreadGroup(self, number) for number in range(self.degree)]


class ThreadGroup(Group):
    """A rank among threads. Refuses what the ranks of processes could not do: other shapes, other calls."""

    def __init__(self, meeting: Meeting, number: int) -> None:
        self.rank = Rank(number, meeting.degree)
        self._meeting = meeting

    def sum_(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        tensor.copy_(torch.stack(self._all("sum", tensor)).sum(0))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all("gather", tensor))

    def hand_out(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._all("hand out", tensor)[0])

    def least(self, number: int) -> int:
        return min(int(one) for one in self._all("least", torch.tensor(number)))

    def abort(self) -> None:
        self._meeting.barrier.abort()

    def close(self) -> None:
        pass

    def _all(self, call: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        meeting = self._meeting
        if not self.rank.number:
            meeting.calls.append((call, tuple(tensor.shape)))
        meeting.given[self.rank.number] = (call, tensor.dtype, tensor.clone())
        meeting.barrier.wait()
        given = [*meeting.given]
        meeting.barrier.wait()
        assert len({(name, dtype, one.shape) for name, dtype, one in given}) == 1, given
        return [one for _, _, one in given]


class _Threads(Processes):
    def __init__(self, meeting: Meeting, channels: list[Channel], threads: list[threading.Thread]) -> None:
        self._meeting = meeting
        self._channels = channels
        self._threads = threads

    def check(self) -> None:
        pass

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._meeting.barrier.abort()
        for thread in self._threads:
            thread.join(TIMEOUT)


class ParallelHarness(Harness):
    """A harness whose model is shared by `degree` ranks, each a thread. To be closed."""

    def __init__(self, base: Path, *, degree: int = 2, fully_sharded: bool = True, **options: Any) -> None:
        self._degree = degree
        self._fully = fully_sharded
        self._tuner = options.pop("tuner", None)
        super().__init__(base, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def make(
        self, load: Callable[..., BaseModel], build: Callable[..., ModelRunner]
    ) -> tuple[BaseModel, ModelRunner]:
        """See Harness."""
        degree = self._degree
        self.meeting = Meeting(degree)
        groups = self.meeting.groups()
        self.shares = [Share(group.rank, fully_sharded=self._fully) for group in groups]
        for share, group in zip(self.shares, groups, strict=True):
            share.group = group
        bases = [load(degree=degree) for _ in range(degree)]
        expected = [expect(bases[0]), *[None] * (degree - 1)]
        for share, base in zip(self.shares, bases, strict=True):
            share.take(base.model)
        pairs = [socket.socketpair() for _ in range(1, degree)]
        own, others = ([Channel(ends[side], TIMEOUT) for ends in pairs] for side in (0, 1))
        followers = Followers(own)
        tuners = [LeadingTuner(self._tuner, followers), *map(ToldTuner, others)]

        def construct(number: int) -> ModelRunner:
            try:
                return build(
                    bases[number],
                    share=self.shares[number],
                    tuner=tuners[number],
                    expected=expected[number],
                )
            except BaseException:
                self.meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(degree) as pool:
            futures = [pool.submit(construct, number) for number in range(degree)]
        if any(future.exception() for future in futures):
            for channel in (*own, *others):
                channel.close()
        self.runners = [future.result() for future in futures]
        threads = [
            threading.Thread(target=self._follow, args=(runner, share, channel), daemon=True)
            for runner, share, channel in zip(self.runners[1:], self.shares[1:], others, strict=True)
        ]
        for thread in threads:
            thread.start()
        self.runners[0].lead(
            lambda executor: LeadingExecutor(
                executor,
                self.shares[0],
                followers,
                _Threads(self.meeting, own, threads),
                step_seconds=TIMEOUT,
                settle_seconds=1.0,
            )
        )
        return bases[0], self.runners[0]

    def _follow(self, runner: ModelRunner, share: Share, channel: Channel) -> None:
        try:
            Follower(runner.executor, share.group, channel, torch.device("cpu")).follow(1.0)
        except Exception:  # noqa: BLE001 (as a process ends: all that wait for it find out)
            share.group.abort()
        finally:
            channel.close()
