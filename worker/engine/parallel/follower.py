"""Ranks 1 and up: do what rank 0 says, until it is gone. A process of its own: `python -m` this module."""

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import torch
import transformers

from worker.engine.cuts import Rank
from worker.engine.executor import Executor
from worker.engine.kernels.tilings import Fit, Situation, Tuner
from worker.engine.parallel import orders
from worker.engine.parallel.build import build_runner, load
from worker.engine.parallel.channel import Channel, Gone
from worker.engine.parallel.group import Group, ProcessGroup

logger = logging.getLogger(__name__)


_STILL_SECONDS = 600.0
"""How long a message from rank 0 may stand still; if that is gone it is known at once."""


class Follower:
    """A rank that has its share of the model, and its executor."""

    def __init__(self, executor: Executor, group: Group, channel: Channel, device: torch.device) -> None:
        self._executor = executor
        self._group = group
        self._channel = channel
        self._device = device

    @torch.inference_mode()
    def follow(self, settle_seconds: float) -> None:
        """Do what comes until the other side is gone. Raises what failed here and not there."""
        while True:
            try:
                order = orders.read_order(self._channel.receive(None))
            except Gone:
                return
            try:
                self._obey(order)
            except Gone:
                return
            except Exception as exc:
                logger.exception("a step failed")
                self._channel.send(orders.encode(orders.Failed(repr(exc))))
                if isinstance(order, orders.Put):
                    continue
                # Rank 0 failed in the same place, or waits for this one in vain: then this must end.
                answer = orders.read_order(self._channel.receive(settle_seconds))
                if not isinstance(answer, orders.Resume):
                    raise

    def _obey(self, order: orders.Order) -> None:
        match order:
            case orders.Run():
                latest = None
                if order.latest is not None:
                    latest = torch.empty(order.latest, dtype=torch.int64, device=self._device)
                    self._group.hand_out(latest)
                self._executor.run(order.rows, latest)
            case orders.RunUncached():
                self._executor.run_uncached(order.prompts)
            case orders.Put():
                data = self._channel.receive(None)
                weights = orders.unpack(order, data, pin=self._device.type == "cuda")
                self._executor.put(order.slot, weights)
                self._channel.send(orders.encode(orders.Done()))
            case orders.Scrub():
                self._executor.scrub(order.leftovers)
            case orders.Copy():
                self._executor.copy(order.copies)
            case _:
                raise AssertionError(f"not an order to a rank at work: {order}")


class ToldTuner(Tuner):
    """Takes what rank 0 found."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def tune(self, situation: Situation) -> Fit:
        """See Tuner."""
        told = orders.read_order(self._channel.receive(None))
        assert isinstance(told, orders.Fitted), told
        return told.fit


def main(orders_fd: int, life_fd: int) -> None:
    """Build this rank's share as the first message says, then follow.

    `orders_fd` is a socket to rank 0, `life_fd` a pipe that nobody writes to: rank 0 is gone when it ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for rank 0, which may still need this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(life_fd,), name="life", daemon=True).start()
    channel = Channel(socket.socket(fileno=orders_fd), _STILL_SECONDS)
    begin = orders.read_order(channel.receive(None))
    assert isinstance(begin, orders.Begin), begin
    form = f"rank {begin.rank}: %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    try:
        _serve(begin, channel)
    except Gone:
        return
    except Exception as exc:
        logger.exception("this rank ends")
        channel.send(orders.encode(orders.Failed(str(exc))))
        raise


def _serve(begin: orders.Begin, channel: Channel) -> None:
    setup, rank = begin.setup, Rank(begin.rank, begin.setup.degree)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(begin.threads)
    base, share, _ = load(setup, rank)
    channel.send(orders.encode(orders.Loaded()))
    meet = orders.read_order(channel.receive(None))
    assert isinstance(meet, orders.Meet), meet
    share.group = ProcessGroup(rank, base.device, Path(begin.place), setup.step_seconds)
    runner = build_runner(setup, base, share, tuner=ToldTuner(channel), costs=meet.costs)
    channel.send(orders.encode(orders.Done()))
    Follower(runner.executor, share.group, channel, base.device).follow(setup.settle_seconds)


def _end_with(life: int) -> None:
    """End this process, whatever it waits for, when rank 0 has ended."""
    os.read(life, 1)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:3]))
    except Exception:  # noqa: BLE001 (it was logged, and told)
        os._exit(1)
    os._exit(0)  # libraries take their time to leave, and may wait for ranks that are gone
