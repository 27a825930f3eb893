"""How the LoRA kernels are fitted to a device: what is timed, chosen and kept. Nothing is launched here."""

import threading
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import msgspec
import pytest
import torch

from worker.engine.kernels.tilings import Situation, Work, default_tiling, expands_to_try, shrinks_to_try

if not find_spec("triton"):
    pytest.skip("Triton is not installed; it has wheels for Linux only", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from worker.engine.kernels import tuning
from worker.engine.kernels.tuning import Timer, TimingTuner

QKV, DOWN = (64, (64, 32, 32)), (128, (64,))
CHUNK = 1024
SITUATION = Situation(
    [QKV, DOWN, QKV],
    decode_tokens=8,
    chunk_tokens=CHUNK,
    max_loras=4,
    max_rank=16,
    lora_dtype=torch.bfloat16,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)
WORKS = [Work(*one, 16, tokens, 2) for tokens in (8, CHUNK) for one in (QKV, DOWN)]


class FakeTrial:
    """A launch of it is what was asked for, so that the fake timer can tell how long it takes."""

    def __init__(self, dimensions, capacity, situation):
        self.work = Work(*dimensions, situation.max_rank, capacity, situation.dtype.itemsize)
        self.tokens = capacity

    def kernels(self, tiling, runs=None):
        return SimpleNamespace(work=self.work, tiling=tiling, runs=runs)

    def products(self, tokens):
        return SimpleNamespace(work=self.work, tiling=None, tokens=tokens)


class FakeTimer(Timer):
    """Seconds by tiling, 1 by default; products and kernels of one run by their tokens."""

    def __init__(self, seconds=(), *, call=5.0, product=0.01, kernel=0.02, idle=1.0):
        self.seconds = dict(seconds)
        self.call, self.product, self.kernel, self.idle = call, product, kernel, idle
        self.asked = []

    def replayed(self, launch):
        assert launch.work.max_tokens == SITUATION.decode_tokens
        return self.time(launch)

    def launched(self, launch):
        assert launch.work.max_tokens == CHUNK
        return self.time(launch)

    def time(self, launch):
        self.asked.append(launch)
        if launch.tiling is None:
            return self.call + self.product * launch.tokens
        if launch.runs is not None:
            ((slot, start, stop),) = launch.runs
            assert (slot, start) == (0, 0)
            return self.idle + self.kernel * stop
        seconds = self.seconds.get((launch.work, launch.tiling), 1.0)
        if isinstance(seconds, Exception):
            raise seconds
        return seconds

    @property
    def tilings(self):
        return [(one.work, one.tiling) for one in self.asked if one.tiling and one.runs is None]


@pytest.fixture(autouse=True)
def _fake_trials(monkeypatch):
    monkeypatch.setattr(tuning, "Trial", FakeTrial)


def tune(timer, situation=SITUATION, file=None, seconds=1.0, clock=lambda: 0.0):
    return TimingTuner(timer, seconds, file, clock).tune(situation)


def test_every_kind_of_projection_is_timed_once_for_each_kind_of_step():
    timer = FakeTimer()
    fit = tune(timer)
    assert fit.tilings == {work: default_tiling(work) for work in WORKS}
    for work in WORKS:
        expected = [*shrinks_to_try(work), *expands_to_try(default_tiling(work))]
        assert [tiling for own, tiling in timer.tilings if own == work] == expected


def test_fastest_shrink_is_taken_and_the_fastest_expand_beside_it():
    work = WORKS[0]
    shrink = shrinks_to_try(work)[2]
    expand = expands_to_try(shrink)[3]
    timer = FakeTimer({(work, shrinks_to_try(work)[1]): 0.8, (work, shrink): 0.7, (work, expand): 0.6})
    fit = tune(timer)
    assert fit.tilings[work] == expand
    assert fit.tilings[WORKS[1]] == default_tiling(WORKS[1])


def test_what_is_hardly_faster_is_noise():
    work = WORKS[2]
    timer = FakeTimer({(work, shrinks_to_try(work)[1]): 0.98})
    assert tune(timer).tilings[work] == default_tiling(work)


def test_tiling_that_does_not_fit_the_device_is_passed_over_even_the_default():
    work = WORKS[3]
    too_much, error = OutOfResources(200, 100, "shared memory"), RuntimeError("Triton Error [CUDA]")
    timer = FakeTimer({(work, default_tiling(work)): too_much, (work, shrinks_to_try(work)[1]): error})
    assert tune(timer).tilings[work] == shrinks_to_try(work)[2]


@pytest.mark.parametrize(
    ("costs", "least"),
    [
        # A run of t adds 0.02 t by the kernels, and takes 5 + 0.01 t as products: equal at 500.
        ({}, 512),
        ({"call": 0.7}, 128),
        ({"call": 0.0}, 64),
        ({"call": 11.0}, None),
        ({"product": 0.03}, None),
        # What the kernels take without any token is paid anyway.
        ({"idle": 1000.0}, 512),
    ],
)
def test_long_runs_go_by_products_where_that_is_cheaper(costs, least):
    assert tune(FakeTimer(**costs)).dense_from == least


def test_adapters_of_another_type_than_the_model_have_no_products():
    situation = SITUATION._replace(lora_dtype=torch.float32)
    timer = FakeTimer(call=0.0)
    assert tune(timer, situation).dense_from is None
    assert all(launch.runs is None for launch in timer.asked)


def test_what_was_found_is_kept_and_not_timed_again(tmp_path):
    file, timer, again = tmp_path / "new" / "gpu.json", FakeTimer(call=0.7), FakeTimer(call=0.7)
    shrink = shrinks_to_try(WORKS[0])[1]
    timer.seconds[WORKS[0], shrink] = 0.5
    fit = tune(timer, file=file)
    assert tune(again, file=file) == fit
    assert not again.asked
    assert {path.name for path in file.parent.iterdir()} == {"gpu.json", "gpu.json.lock"}


@pytest.mark.parametrize(
    "change",
    [
        {"max_loras": 5},
        {"max_rank": 32},
        {"chunk_tokens": CHUNK * 2},
        {"dtype": torch.float32},
        {"lora_dtype": torch.float32},
        {"projections": [QKV, (128, (72,))]},
    ],
)
def test_another_situation_is_timed_anew_and_the_first_stays_known(change, tmp_path):
    file = tmp_path / "gpu.json"
    first = tune(FakeTimer(), file=file)
    other = SITUATION._replace(**change)

    class AnyStep(FakeTimer):
        def replayed(self, launch):
            return self.time(launch)

        launched = replayed

    timer = AnyStep()
    tune(timer, other, file)
    assert timer.tilings
    timer = FakeTimer()
    assert tune(timer, file=file) == first
    assert not timer.asked


def test_as_many_layers_more_are_another_model_but_the_same_projections(tmp_path):
    file, timer = tmp_path / "gpu.json", FakeTimer()
    tune(FakeTimer(), file=file)
    tune(timer, SITUATION._replace(projections=[QKV, DOWN] * 3), file)
    assert not timer.tilings
    assert timer.asked


class Clock:
    """A second for every look."""

    def __init__(self):
        self.now = -1.0

    def __call__(self):
        self.now += 1
        return self.now


def test_time_is_bounded_and_the_next_start_goes_on(tmp_path):
    """A search that was cut off is begun anew: what it would have found is not known."""
    file, seen, late = tmp_path / "gpu.json", Counter(), expands_to_try(default_tiling(WORKS[0]))[-1]
    for _ in range(40):
        timer = FakeTimer({(WORKS[0], late): 0.5}, call=0.7)
        fit = tune(timer, file=file, seconds=18.0, clock=Clock())
        assert len(timer.tilings) <= 20
        assert fit.tilings.keys() == set(WORKS), "what is not known has its default"
        seen.update(work for work, _ in timer.tilings)
        if not timer.asked:
            break
    assert seen.keys() == set(WORKS)
    assert fit.dense_from == 128
    assert fit.tilings[WORKS[0]] == late


def test_workers_that_start_at_once_find_the_same(tmp_path):
    """One of them tunes, and the others wait for what it finds."""
    file, timers, fits = tmp_path / "gpu.json", [], []

    def start(number):
        favourite = shrinks_to_try(WORKS[0])[1 + number]
        timers.append(FakeTimer({(WORKS[0], favourite): 0.5}))
        fits.append(tune(timers[-1], file=file))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(bool(timer.asked) for timer in timers) == 1
    assert all(fit == fits[0] for fit in fits)


def test_what_is_known_needs_no_memory(tmp_path, monkeypatch):
    file, work = tmp_path / "gpu.json", WORKS[1]
    found = tune(FakeTimer({(work, shrinks_to_try(work)[2]): 0.1}), file=file)

    def no_memory(*given):
        raise torch.OutOfMemoryError("64 MiB")

    monkeypatch.setattr(tuning, "Trial", no_memory)
    assert tune(FakeTimer(), file=file) == found


@pytest.mark.parametrize("change", [{"splits": 3}, {"ranks": 8}, {"columns": 48}, {"shrink_warps": 6}])
def test_tiling_that_the_kernels_cannot_be_cut_by_is_found_anew(change, tmp_path, caplog):
    file = tmp_path / "gpu.json"
    tune(FakeTimer(), file=file)
    known = msgspec.json.decode(file.read_bytes())
    name = next(iter(known["tilings"]))
    known["tilings"][name] = list(default_tiling(WORKS[0])._replace(**change))
    file.write_bytes(msgspec.json.encode(known))
    timer = FakeTimer()
    assert tune(timer, file=file).tilings == {work: default_tiling(work) for work in WORKS}
    assert {work for work, _ in timer.tilings} == {WORKS[0]}
    assert "makes no sense" in caplog.text


def test_no_time_means_defaults_and_what_is_known(tmp_path):
    file, timer = tmp_path / "gpu.json", FakeTimer()
    assert tune(timer, file=file, seconds=0.0).tilings == {work: default_tiling(work) for work in WORKS}
    assert not timer.asked
    assert not file.exists()
    work, shrink = WORKS[1], shrinks_to_try(WORKS[1])[3]
    found = tune(FakeTimer({(work, shrink): 0.1}), file=file)
    assert tune(timer, file=file, seconds=0.0) == found
    assert found.tilings[work] == shrink


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"tilings": {"64 to 64": [1, 2]}}',
        b'{"tilings": {"a": [0,32,16,4,3,64,4,2]}}',
        b"\xff",
        None,
    ],
)
def test_file_that_cannot_be_read_is_replaced(content, tmp_path, caplog):
    file = tmp_path / "gpu.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert tune(FakeTimer(), file=file).tilings
    assert "cannot read how kernels were tuned" in caplog.text
    if content is None:
        assert "cannot keep how kernels were tuned" in caplog.text
    else:
        assert len(msgspec.json.decode(file.read_bytes())["tilings"]) == len(WORKS)


def test_no_memory_to_tune_in_leaves_the_defaults(monkeypatch, caplog):
    def no_memory(*given):
        raise torch.OutOfMemoryError("64 MiB")

    monkeypatch.setattr(tuning, "Trial", no_memory)
    fit = tune(FakeTimer())
    assert (fit.tilings, fit.dense_from) == ({work: default_tiling(work) for work in WORKS}, None)
    assert "no memory to tune kernels in" in caplog.text


def test_nothing_to_do_lora_on_needs_no_timing():
    timer = FakeTimer()
    fit = tune(timer, SITUATION._replace(projections=[]))
    assert (fit.tilings, fit.dense_from, timer.asked) == ({}, None, [])
