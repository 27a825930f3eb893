"""Ranks as processes: they say the same, and none of them outlives, or is waited for, for ever."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests import tiny
from tests.engine.harness import Harness
from tests.engine.test_parallel import assert_as_peft, mixed, prompts, request, tokens
from worker.engine.parallel import build
from worker.engine.parallel import start as start_module
from worker.engine.parallel.start import start
from worker.engine.setup import Setup
from worker.errors import EngineFailed, ModelError

BOUND_SECONDS = 60.0


def setup(base, **changes):
    given = {
        "weights": str(base),
        "degree": 2,
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": None,
        "trust_remote_code": False,
        "fully_sharded": True,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "adapters": True,
        "max_loras": 3,
        "max_lora_rank": 64,
        "lora_dtype": "auto",
        "settle_seconds": 2.0,
    }
    return Setup(**{**given, **changes})


class ProcessHarness(Harness):
    """A harness whose other ranks are processes. To be closed."""

    def __init__(self, base, **changes):
        self._setup = setup(base, **changes)
        super().__init__(base, max_num_seqs=6, max_num_batched_tokens=24, max_loras=3)

    def make(self, load, build):
        return start(self._setup)


def children():
    return [
        child for child in psutil.Process().children() if "parallel.follower" in " ".join(child.cmdline())
    ]


def test_nobody_waits_for_what_rank_0_asks_the_whole_model(llama, monkeypatch):
    events = []
    for module, name in ((build, "expect"), (start_module.Followers, "tell")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, own=own, name=name, **k: (events.append(name), own(*a, **k))[1]
        )
    ProcessHarness(llama).runner.close()
    assert events[:2] == ["expect", "tell"]


def test_processes_say_what_peft_says_and_a_dead_one_ends_the_engine(kind):
    model, rows = kind("qwen2"), prompts(3)
    threads = torch.get_num_threads()
    harness = ProcessHarness(model.base, rope_factors=(2.0,))  # which the others are told of, too
    try:
        (follower,) = children()
        done = harness.run(mixed([None, *map(harness.adapter, model.adapters)], rows))
        assert_as_peft(model, rows, done, len(model.adapters))

        follower.send_signal(signal.SIGINT)  # as a terminal sends it to all of them, though rank 0 drains
        follower.send_signal(signal.SIGTERM)
        again = harness.run([request("0/0", rows[0])])
        assert tokens(again)["0/0"] == tokens(done)["0/0"]

        follower.kill()
        started = time.monotonic()
        with pytest.raises(EngineFailed):
            harness.run([request("x", [1, 2, 3])])
        assert time.monotonic() - started < BOUND_SECONDS
    finally:
        harness.runner.close()
        harness.runner.close()  # as one that was closed
    assert not children()
    assert torch.get_num_threads() == threads


def test_one_that_hangs_ends_the_engine(llama):
    harness = ProcessHarness(llama, step_seconds=2.0, fully_sharded=False)
    try:
        (follower,) = children()
        expected = tokens(harness.run([request("x", [1, 2, 3])]))
        assert expected
        follower.suspend()
        with pytest.raises(EngineFailed):
            harness.run([request("x", [1, 2, 3])])
    finally:
        harness.runner.close()  # which ends what does not end by itself
    assert not children()


def test_what_one_of_them_cannot_do_is_said_and_nobody_is_left(llama, tmp_path):
    broken = tiny.make_base(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        start(setup(broken))
    assert not children()


LEADER = """
import sys, time
from tests.engine.test_parallel_processes import ProcessHarness, children
harness = ProcessHarness(sys.argv[1])
print(children()[0].pid, flush=True)
time.sleep(600)
"""


def test_ranks_end_with_rank_0_however_that_ends(llama):
    command = [sys.executable, "-c", LEADER, str(llama)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        try:
            pid = int(leader.stdout.readline())
            follower = psutil.Process(pid)
            assert follower.is_running()
        finally:
            os.kill(leader.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs([follower], timeout=BOUND_SECONDS)
    assert not alive
    assert gone


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("fully", [True, False])
def test_two_gpus_say_what_peft_says(fully, kind):
    model, rows = kind("qwen2"), prompts(3)
    harness = ProcessHarness(model.base, device="cuda", fully_sharded=fully)
    try:
        done = harness.run(mixed([None, *map(harness.adapter, model.adapters)], rows))
    finally:
        harness.runner.close()
    assert_as_peft(model, rows, done, len(model.adapters))


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are enough")
def test_more_ranks_than_gpus_are_refused(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="tensor_parallel_degree is 2, and 1 CUDA devices were found"):
        start(setup(llama, device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ModelError, match="CUDA_VISIBLE_DEVICES"):
        start(setup(llama, device="cuda:1"))
