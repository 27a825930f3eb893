"""A handler in its process: what it is asked, what it answers, and every way it can fail."""

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.custom.conftest import MODELS, ask, handler_of
from tests.e2e.conftest import wait_until
from worker.custom.package.djl_python import Input
from worker.custom.package.djl_python.np_util import from_nd_list, to_nd_list
from worker.errors import EngineFailed, HandlerDied, ModelError

UNRULY = MODELS / "unruly"


def run(coroutine):
    return asyncio.run(coroutine)


def test_echo_answers_as_in_djl_serving() -> None:
    async def play():
        async with handler_of(MODELS / "echo") as handler:
            whole = await ask(handler, b"hello")
            stream = await ask(handler, b"", stream="true")
            raised = await ask(handler, b"", exception="no way")
            odd = await ask(handler, b"", typeerror="1")
            starved = await ask(handler, b"", OOM="1")
            return whole, await stream.read(), raised, odd, starved, handler.num_restarts

    whole, stream, raised, odd, starved, restarts = run(play())
    assert (whole.status, whole.body) == (200, b"hello")
    assert stream == b"t-0\nt-1\nt-2\nt-3\nt-4\n"
    assert raised.status == 424
    assert json.loads(raised.body) == {"code": 424, "message": "invoke handler failure", "error": "no way"}
    assert "Traceback" not in raised.body.decode()
    assert (odd.status, "Invalid output type" in odd.reason) == (424, True)
    assert starved.status == 507
    assert restarts == 0


def test_a_handler_that_exits_fails_its_call_and_is_there_for_the_next() -> None:
    async def play():
        async with handler_of(MODELS / "echo") as handler:
            with pytest.raises(HandlerDied, match="exit code 0"):
                await ask(handler, b"", exit="1")
            return (await ask(handler, b"again")).body, handler.num_restarts

    assert run(play()) == (b"again", 1)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", "SIGSEGV"),
        ("leave", "exit code 7"),
        ("loop", "did not answer within 2 s"),
        ("nonsense", "no answer"),
    ],
)
def test_what_ends_the_process_fails_one_call_and_no_other(how: str, reason: str) -> None:
    async def play():
        async with handler_of(UNRULY, call_seconds=2) as handler:
            calls = [ask(handler, how=word) for word in ("before", how, "after")]
            return await asyncio.gather(*calls, return_exceptions=True)

    before, died, after = run(play())
    assert (before.body, after.body) == (b"BEFORE", b"AFTER")
    assert isinstance(died, HandlerDied)
    assert reason in str(died)


_BATCHES = """
import os
from djl_python import Output

def handle(inputs):
    if inputs.is_empty():
        return None
    texts = [one.get_as_string() for one in inputs.get_batches()]
    while "loop" in texts:
        pass
    if "crash" in texts:
        os._exit(5)
    if "raise" in texts:
        raise ValueError("no such text")
    output = Output()
    for number, text in enumerate(texts):
        output.add(f"{text} of {len(texts)}", key="data", batch_index=number)
    return output
"""


@pytest.mark.parametrize("how", ["crash", "loop"])
def test_of_a_batch_that_ends_the_process_only_the_culprit_fails(tmp_path, how: str) -> None:
    (tmp_path / "model.py").write_text(_BATCHES)

    async def play():
        async with handler_of(tmp_path, call_seconds=2, batch_size=4) as handler:
            texts = [b"one", how.encode(), b"two"]
            return await asyncio.gather(*(ask(handler, text) for text in texts), return_exceptions=True)

    one, died, two = run(play())
    assert (one.body, two.body) == (b"one of 1", b"two of 1")
    assert isinstance(died, HandlerDied)


def test_of_a_batch_that_fails_only_the_culprit_fails(tmp_path) -> None:
    (tmp_path / "model.py").write_text(_BATCHES)

    async def play():
        async with handler_of(tmp_path, batch_size=4) as handler:
            texts = (b"one", b"raise", b"two")
            return await asyncio.gather(*(ask(handler, text) for text in texts)), handler.num_restarts

    (one, failed, two), restarts = run(play())
    assert (one.body, two.body, restarts) == (b"one of 1", b"two of 1", 0)
    assert (failed.status, failed.reason) == (424, "invoke handler failure: no such text")


def test_calls_that_are_too_large_together_are_made_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("worker.custom.messages.MAX_MESSAGE_BYTES", 2000)
    (tmp_path / "model.py").write_text(_BATCHES)

    async def play():
        async with handler_of(tmp_path, batch_size=4) as handler:
            return await asyncio.gather(*(ask(handler, b"x" * size) for size in (900, 3000, 901)))

    one, large, two = run(play())
    assert (one.body, two.body) == (b"x" * 900 + b" of 1", b"x" * 901 + b" of 1")
    assert large.status == 413
    assert "the message has" in large.reason


def test_what_a_handler_begins_with_is_not_for_a_request_to_say() -> None:
    async def play():
        options = {"model_dir": "/elsewhere"}
        async with handler_of(UNRULY, options=options) as handler:
            said = {"model_dir": "/etc", "device_id": "7", "handler": "leave"}
            return json.loads((await handler.call("handle", said, (("how", b"ready"),))).body)

    said = run(play())
    assert (said["properties"]["device_id"], said["properties"]["model_dir"]) == ("-1", str(UNRULY))
    assert said["began"]["model_dir"] == str(UNRULY)


def test_what_waits_goes_together_as_far_as_the_batch_size(tmp_path) -> None:
    (tmp_path / "model.py").write_text(_BATCHES)

    async def play():
        async with handler_of(tmp_path, batch_size=3) as handler:
            return await asyncio.gather(*(ask(handler, b"x") for _ in range(7)))

    sizes = sorted(answer.body.decode() for answer in run(play()))
    assert sizes == ["x of 1"] + ["x of 3"] * 6


def test_requests_that_wait_go_together_and_each_gets_its_own_answer() -> None:
    async def play():
        async with handler_of(MODELS / "adaptecho", batch_size=3) as handler:
            texts = [f"text {number}" for number in range(8)]
            found = await asyncio.gather(*(ask(handler, text.encode()) for text in texts))
            return texts, found

    texts, found = run(play())
    assert [answer.body.decode() for answer in found] == texts


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("starve", 507, "out of memory"),
        ("bad_code", 424, "'two hundred'"),
        ("no_json", 424, "not JSON serializable"),
        ("huge", 424, "it may have"),
        ("nothing", 204, "No content"),
        ("teapot", 418, "short and"),
        ("later", 200, "OK"),
    ],
)
def test_every_answer_has_its_status(how: str, status: int, words: str) -> None:
    async def play():
        async with handler_of(UNRULY) as handler:
            return await ask(handler, how=how), (await ask(handler, how="still")).body

    answer, still = run(play())
    assert answer.status == status
    assert words in answer.reason
    assert still == b"STILL"


def test_a_stream_that_fails_breaks_off_and_the_handler_lives() -> None:
    async def play():
        async with handler_of(UNRULY) as handler:
            stream = await ask(handler, how="broken_stream")
            with pytest.raises(HandlerDied, match="no two"):
                await stream.read()
            formatted = await (await ask(handler, how="token_stream")).read()
            return formatted, handler.num_restarts

    assert run(play()) == (b'{"outputs": "a"}\n{"outputs": "b"}\n', 0)


def test_a_stream_without_end_is_ended() -> None:
    async def play():
        async with handler_of(UNRULY, call_seconds=30) as handler:
            with pytest.raises(HandlerDied):
                await (await ask(handler, how="endless")).read()
            return (await ask(handler, how="after")).body

    assert run(play()) == b"AFTER"


def test_the_handler_is_told_what_djl_serving_tells_it() -> None:
    async def play():
        options = {"model_id": "some/model", "topK": "5"}
        async with handler_of(UNRULY, options=options) as handler:
            return json.loads((await handler.call("handle", {"X-Mine": "1"}, (("how", b"ready"),))).body)

    said = run(play())
    assert said["began"]["topK"] == "5"
    assert said["began"]["model_dir"] == said["here"] == str(UNRULY)
    assert (said["properties"]["X-Mine"], said["properties"]["device_id"]) == ("1", "-1")
    assert said["beside"] == "from beside"
    assert said["secrets"] == []


def test_what_it_prints_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "worker.custom.process")

    async def play():
        async with handler_of(UNRULY) as handler:
            await ask(handler, how="x")

    run(play())
    assert {"handler: began on stdout", "handler: began on stderr"} <= set(caplog.messages)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("def hande(inputs): return None", "no function handle"),
        ("def handle(inputs): raise MemoryError('too big')", "507"),
        ("def handle(inputs): raise ValueError('no weights here')", "no weights here"),
        ("import os\ndef handle(inputs): os._exit(3)", "exit code 3"),
        ("raise SystemExit(4)", "exit code 4"),
        ("while True: pass", "not ready within 1 s"),
    ],
)
def test_a_handler_that_does_not_start_says_why(tmp_path, code: str, reason: str) -> None:
    (tmp_path / "model.py").write_text(code)

    async def play():
        async with handler_of(tmp_path, start_seconds=1 if "while" in code else 60):
            pass

    with pytest.raises(ModelError, match=reason):
        run(play())


def test_adapters_are_told_again_to_a_new_process() -> None:
    from worker.custom.messages import Call

    async def play():
        async with handler_of(MODELS / "adaptecho") as handler:
            call = Call("register_adapter", {"name": "a"}, (("echooption", b"-opt-"),))
            assert (await handler.call(call.function, call.properties, call.content)).status == 200
            handler.remember("a", call)
            assert handler._process is not None
            await handler._process.kill()
            return (await ask(handler, b"x", adapter="a")).body

    assert run(play()) == b"a-opt-x"


def test_urgent_calls_go_first_but_not_for_ever(tmp_path) -> None:
    (tmp_path / "model.py").write_text(
        "from djl_python import Output\nseen = []\n"
        "def handle(inputs):\n"
        "    if inputs.is_empty():\n        return None\n"
        "    seen.append(inputs.get_as_string())\n"
        "    return Output().add_as_json(seen)\n"
    )

    async def play():
        async with handler_of(tmp_path) as handler:
            rows = [handler.call("handle", {}, (("data", b"row"),), urgent=False) for _ in range(2)]
            requests = [ask(handler, b"request") for _ in range(20)]
            await asyncio.gather(*rows, *requests)
            return json.loads((await ask(handler, b"last")).body)

    seen = run(play())
    assert [number for number, what in enumerate(seen) if what == "row"] == [16, 21]


def test_processes_that_the_handler_starts_find_djl_python(tmp_path) -> None:
    (tmp_path / "model.py").write_text(
        "import subprocess, sys, multiprocessing\n"
        "from djl_python import Output\n"
        "from djl_python.inputs import Input\n"
        "def inner(number):\n    return str(number + 1)\n"
        "def handle(inputs: Input):\n"
        "    if inputs.is_empty():\n        return None\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        return Output().add(pool.map(inner, [1])[0])\n"
    )

    async def play():
        async with handler_of(tmp_path) as handler:
            return (await ask(handler)).body

    assert run(play()) == b"2"


def test_another_djl_python_is_not_used_and_the_log_says_so(tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "worker.custom.process")
    (tmp_path / "djl_python").mkdir()
    (tmp_path / "djl_python" / "__init__.py").write_text("raise AssertionError('not this one')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    async def play():
        async with handler_of(MODELS / "echo") as handler:
            return (await ask(handler, b"x")).body

    assert run(play()) == b"x"
    assert any("the djl_python that is installed here is not used" in message for message in caplog.messages)


def test_an_adapter_that_ends_every_new_process_is_not_told_again() -> None:
    from worker.custom.messages import Call

    async def no_sleep(_: float) -> None:
        pass

    async def play():
        async with handler_of(UNRULY, sleep=no_sleep) as handler:
            handler.on_lost = lambda *told: lost.append(told)
            handler.remember("poison", Call("register_adapter", {"name": "poison"}, (("kill", b"1"),)))
            with pytest.raises(HandlerDied):
                await ask(handler, how="leave")
            return (await ask(handler, how="after")).body

    lost: list[tuple[object, ...]] = []
    assert run(play()) == b"AFTER"
    ((name, reason, ended),) = lost
    assert (name, ended) == ("poison", True)
    assert reason


def test_a_handler_that_does_not_start_again_ends_the_worker(tmp_path) -> None:
    (tmp_path / "model.py").write_text(
        "import os, pathlib\n"
        "def handle(inputs):\n"
        "    if not inputs.is_empty():\n        os._exit(9)\n"
        "    pathlib.Path('began').mkdir()\n"
    )
    pauses = []

    async def no_sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def play():
        async with handler_of(tmp_path, sleep=no_sleep) as handler:
            calls = [asyncio.create_task(ask(handler)) for _ in range(3)]
            with pytest.raises(EngineFailed, match="File exists: 'began'"):
                await handler.wait()
            return await asyncio.gather(*calls, ask(handler), return_exceptions=True)

    outcomes = run(play())
    assert [type(outcome) for outcome in outcomes] == [HandlerDied] * 4
    assert pauses == [1, 2, 4]


_ORPHAN = """
import asyncio, sys
from pathlib import Path
from tests.custom.conftest import ask, handler_of

async def play():
    async with handler_of(Path(sys.argv[1])) as handler:
        print(handler._process._process.pid, flush=True)
        await ask(handler, how="loop")

asyncio.run(play())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has to do it")
def test_a_handler_dies_with_its_worker_even_in_an_endless_loop() -> None:
    command = [sys.executable, "-c", _ORPHAN, str(UNRULY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        worker.kill()

    def is_alive() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    wait_until(lambda: not is_alive(), f"the end of {pid}")


def test_a_caller_that_leaves_costs_nobody_else() -> None:
    async def play():
        async with handler_of(UNRULY) as handler:
            gone = asyncio.create_task(ask(handler, how="slow"))
            queued = asyncio.create_task(ask(handler, how="never"))
            await asyncio.sleep(0)
            gone.cancel()
            queued.cancel()
            return (await ask(handler, how="after")).body, handler.num_restarts

    assert run(play()) == (b"AFTER", 0)


@pytest.mark.parametrize("form", ["ndlist", "npz", "npy"])
def test_arrays_are_read_in_every_form(form: str) -> None:
    array = np.arange(6, dtype="float32").reshape(2, 3)
    file = io.BytesIO()
    if form == "npz":
        np.savez(file, array)
    elif form == "npy":
        np.save(file, array)
    body = bytes(to_nd_list([array])) if form == "ndlist" else file.getvalue()

    async def play():
        async with handler_of(MODELS / "arrays") as handler:
            first = (await ask(handler, body)).body
            return first, (await ask(handler, body, npz="1")).body

    first, second = run(play())
    np.testing.assert_array_equal(from_nd_list(first)[0], array)
    np.testing.assert_array_equal(from_nd_list(second)[0], array * 2)


def test_a_file_that_would_be_unpickled_is_refused() -> None:
    file = io.BytesIO()
    np.savez(file, np.array([{"a": 1}], dtype=object))
    given = Input()
    given.content.add("data", file.getvalue())
    with pytest.raises(ValueError, match="allow_pickle"):
        given.get_as_numpy()
