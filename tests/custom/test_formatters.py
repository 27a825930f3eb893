"""Formatters in their process, without an engine: whose apply, what they may do, and what ends them."""

import asyncio
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters_sync.layout import AdapterFolder
from adapters_sync.manifests import PublishedManifest
from tests.custom.conftest import MODELS
from tests.glue.support import until
from worker.custom import formatter_host
from worker.custom.formatters import Formatter, Formatters, NoCode
from worker.custom.opening import find_entry_point, open_formatters
from worker.errors import (
    AdapterInvalid,
    EngineFailed,
    HandlerBusy,
    HandlerRefused,
    HandlerRefusedRow,
    ModelError,
    RowFailed,
)
from worker.settings import read_settings

DJL = MODELS / "formatters"
MARKS = """
from djl_python.input_parser import input_formatter
from djl_python.output_formatter import output_formatter
"""
UNRULY = f"""{MARKS}
import os, sys, time
@input_formatter
def unruly(payload, tokenizer=None, **kwargs):
    how = payload["inputs"]
    if how == "loop":
        while True:
            pass
    if how == "exit":
        os._exit(3)
    if how == "list":
        return [payload]
    if how == "nan":
        return {{"inputs": float("nan")}}
    if how == "raise":
        raise KeyError("colour")
    return {{"inputs": how.upper(), "pid": os.getpid()}}
"""


@asynccontextmanager
async def formatters_of(
    folder: Path | None, *, seconds: float = 60.0, weights: str = ""
) -> AsyncIterator[Formatters]:
    environ = {
        "LORAMILL_CUSTOM_CODE": "true",
        "LORAMILL_ENABLE_LORA": "true",
        "LORAMILL_PREDICT_TIMEOUT_SECONDS": str(seconds),
    }
    settings = read_settings(environ=environ)
    async with open_formatters(settings, folder, weights=weights, environ=os.environ) as formatters:
        assert formatters is not None
        yield formatters


def adapter_in(
    folder: Path, code: str | Path | None = None, *, name: str = "a", version: str = "1"
) -> AdapterFolder:
    path = folder / name / version
    path.mkdir(parents=True)
    if isinstance(code, Path):
        shutil.copy(code / "model.py", path)
    elif code is not None:
        (path / "model.py").write_text(code)
    return AdapterFolder(name, version, path)


async def run(formatters: Formatters, formatter: Formatter | None, **given: Any) -> dict[str, Any]:
    assert formatter is not None
    return await formatters.run(formatter, given, urgent=False)


def test_the_documented_examples_run_to_the_letter_and_an_adapters_own_goes_first(tmp_path: Path) -> None:
    async def play() -> None:
        async with formatters_of(DJL / "model") as formatters:
            model = await formatters.of(None)
            asked = await run(formatters, model.input, inputPrompt="hello", parameters={"seed": 1})
            assert asked == {"inputs": "hello", "parameters": {"seed": 1, "max_new_tokens": 256}}
            said = await run(formatters, model.output, generated_text="yes")
            assert abs(said.pop("formatter_timestamp") - time.time()) < 60
            assert said == {
                "generated_text": "[BASE] yes",
                "custom_formatter_applied": True,
                "original_length": 3,
            }
            own = await formatters.of(adapter_in(tmp_path, DJL / "adapter"))
            asked = await run(formatters, own.input, inputs="hello")
            assert asked["inputs"] == "[ADAPTER_PREFIX] hello"
            assert asked["parameters"] == {"temperature": 0.7, "max_new_tokens": 512}
            said = await run(formatters, own.output, generated_text="two words")
            assert said["generated_text"] == "[ADAPTER] two words"
            assert said["custom_metrics"] == {"text_length": 9, "word_count": 2}
            plain = adapter_in(tmp_path, name="plain")
            assert await formatters.of(plain) == model
            half = adapter_in(tmp_path, DJL / "failing_output", name="half")
            both = await formatters.of(half)
            assert both.input == model.input
            assert str(both.output) == "output formatter custom_output_formatter of adapter half"
            with pytest.raises(HandlerRefusedRow) as refused:
                await run(formatters, both.output, generated_text="")
            words = "RuntimeError: Output formatter intentionally failed"
            assert str(refused.value) == f"The {both.output} failed: {words}"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("list", "TypeError: it returned list, and must return a dict"),
        ("nan", "Out of range float values"),
        ("raise", "KeyError: 'colour'"),
        ("exit", "ended with exit code 3"),
        ("loop", "did not answer within 1 s"),
    ],
)
def test_what_a_formatter_does_wrong_is_told_of_its_own_row_and_of_no_other(tmp_path, how, words) -> None:
    async def play() -> None:
        async with formatters_of(None, seconds=1.0) as formatters:
            own = (await formatters.of(adapter_in(tmp_path, UNRULY))).input
            before = await run(formatters, own, inputs="well")
            calls = [run(formatters, own, inputs=one) for one in ("first", how, "last")]
            first, wrong, last = await asyncio.gather(*calls, return_exceptions=True)
            assert (first["inputs"], last["inputs"]) == ("FIRST", "LAST")
            assert isinstance(wrong, HandlerRefusedRow)
            assert str(wrong).startswith("The input formatter unruly of adapter a failed: ")
            assert words in str(wrong)
            replaced = how in {"exit", "loop"}
            assert formatters.num_restarts == int(replaced)
            assert (last["pid"] != before["pid"]) == replaced

    asyncio.run(play())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(:\n", "cannot be loaded: SyntaxError"),
        ("import djl_python.request_io\n", "No module named 'djl_python.request_io'"),
        (f"{MARKS}def f(payload):\n    return payload\n", "no function that is marked"),
        (
            f"{MARKS}@input_formatter\ndef f(p): ...\n@input_formatter\ndef g(p): ...\n",
            "2 functions .*: f, g",
        ),
        ("import os\nos._exit(4)\n", "exit code 4"),
    ],
)
def test_code_that_cannot_be_loaded_is_refused_and_not_tried_for_every_row(tmp_path, code, words) -> None:
    async def play() -> None:
        folder = adapter_in(tmp_path, code)
        async with formatters_of(None) as formatters:
            with pytest.raises(HandlerRefused, match=words) as refused:
                await formatters.load(folder)
            assert refused.value.status == 424
            with pytest.raises(AdapterInvalid, match=words):
                await formatters.of(folder)
            assert words[:20] in (formatters.note(folder) or "") or "functions" in words
            tries = formatters.num_restarts
            (folder.path / "model.py").write_text(UNRULY)
            with pytest.raises(AdapterInvalid, match=words):
                await formatters.of(folder)
            assert formatters.num_restarts == tries
            await formatters.load(folder)  # who registers it again has it looked at again
            assert (await formatters.of(folder)).input is not None
            assert formatters.note(folder) is None

    asyncio.run(play())


def test_a_process_that_ends_while_it_looks_is_no_verdict_on_the_file(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    once = f"import os\nif not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close()\n"
    once += "    os._exit(9)\n"

    async def play() -> None:
        folder = adapter_in(tmp_path, once + UNRULY)
        async with formatters_of(None) as formatters:
            assert (await formatters.of(folder)).input is not None
            assert formatters.num_restarts == 1

    asyncio.run(play())


def test_a_look_that_finds_too_many_waiting_is_made_again(tmp_path: Path, monkeypatch) -> None:
    async def busy(*_, **__):
        raise HandlerBusy("1000 calls wait")

    async def play() -> None:
        folder = adapter_in(tmp_path, UNRULY)
        async with formatters_of(None) as formatters:
            with monkeypatch.context() as patch:
                patch.setattr(formatters._handler, "call", busy)
                with pytest.raises(RowFailed, match="adapter a wait: 1000 calls wait"):
                    await formatters.of(folder)
                with pytest.raises(HandlerRefused, match="1000 calls wait"):
                    await formatters.load(folder)
            assert (await formatters.of(folder)).input is not None

    asyncio.run(play())


def test_calls_that_end_with_the_formatters_say_that_nobody_formats_any_more(tmp_path: Path) -> None:
    async def play() -> None:
        folder = adapter_in(tmp_path, UNRULY)
        async with formatters_of(None) as formatters:
            own = await formatters.of(folder)
            call = asyncio.create_task(run(formatters, own.input, inputs="loop"))
            await asyncio.sleep(0)
            await until(lambda: not formatters._handler._waiting)  # it is at work
        with pytest.raises(EngineFailed, match="no formatter can be run"):
            await call

    asyncio.run(play())


def test_versions_are_apart_and_what_was_unloaded_is_loaded_again_from_its_folder(tmp_path: Path) -> None:
    code = f"{MARKS}times = []\n@output_formatter\ndef f(r):\n    times.append(1)\n    return "
    code += "{'v': %d, 'n': len(times)}\n"

    async def play() -> None:
        async with formatters_of(None) as formatters:
            folders = [adapter_in(tmp_path, code % number, version=str(number)) for number in (1, 2)]
            one, two = [(await formatters.of(folder)).output for folder in folders]
            assert await run(formatters, one) == {"v": 1, "n": 1}
            assert await run(formatters, two) == {"v": 2, "n": 1}
            assert await run(formatters, one) == {"v": 1, "n": 2}
            await formatters.drop("a")
            assert await run(formatters, one) == {"v": 1, "n": 1}  # a row that began before
            await formatters.drop("b")
            assert await run(formatters, one) == {"v": 1, "n": 2}

    asyncio.run(play())


def test_a_version_whose_code_was_left_out_is_refused_where_code_is_run(tmp_path: Path) -> None:
    folder = adapter_in(tmp_path)
    manifest = PublishedManifest(
        name="a", version="1", source="", published_at=0, rank=1, bytes=1, files=(), left_out_code=True
    )
    (folder.path / "manifest.json").write_bytes(msgspec.json.encode(manifest))

    async def play() -> None:
        async with formatters_of(None) as formatters:
            with pytest.raises(AdapterInvalid, match=r"model\.py was not carried"):
                await formatters.of(folder)

    asyncio.run(play())
    assert NoCode().note(folder) == "its model.py is not run: custom_code is off"


def test_the_tokenizer_is_the_models_and_read_when_it_is_used(tmp_path: Path) -> None:
    from tests import tiny

    base = tiny.make_base(tmp_path / "base")
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "model.py").write_text(
        f"{MARKS}import sys\n@input_formatter\ndef f(payload, tokenizer=None, **kwargs):\n"
        "    early = 'transformers' in sys.modules\n"
        "    return {'ids': tokenizer.encode(payload['inputs']), 'n': len(tokenizer), 'early': early}\n"
    )

    async def play() -> dict[str, Any]:
        async with formatters_of(tmp_path / "model", weights=str(base)) as formatters:
            return await run(formatters, (await formatters.of(None)).input, inputs="hello hello")

    said = asyncio.run(play())
    real = tiny.tokenizer()
    assert said == {"ids": real.encode("hello hello"), "n": len(real), "early": False}


def test_a_model_whose_formatters_cannot_be_loaded_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(f"{MARKS}@input_formatter\ndef f(p): ...\nraise OSError('no table')\n")

    async def play() -> None:
        async with formatters_of(tmp_path):
            pass

    with pytest.raises(ModelError, match=r"^the formatters of the model cannot be used: .* no table$"):
        asyncio.run(play())


@pytest.mark.parametrize(
    ("code", "is_handler"),
    [
        (f"{MARKS}@input_formatter\ndef f(p): ...\n", False),
        ("import djl_python.output_formatter as o\n@o.output_formatter\ndef f(p): ...\n", False),
        (f"{MARKS}@input_formatter\ndef f(p): ...\nclass A:\n    def handle(self): ...\n", False),
        (f"{MARKS}@input_formatter\ndef f(p): ...\ndef handle(inputs): ...\n", True),
        (f"{MARKS}@input_formatter\ndef f(p): ...\nhandle = f\n", True),
        (f"{MARKS}from mine import handle\n@input_formatter\ndef f(p): ...\n", True),
        (f"{MARKS}from mine import *\n@input_formatter\ndef f(p): ...\n", True),
        (f"{MARKS}try:\n    def handle(i): ...\nfinally: ...\n@input_formatter\ndef f(p): ...\n", True),
        ("def f(:", True),
        ("", True),
    ],
)
def test_a_model_py_with_formatters_and_no_handle_is_no_handler(tmp_path, code, is_handler) -> None:
    (tmp_path / "model.py").write_text(code)
    settings = read_settings(environ={"LORAMILL_CUSTOM_CODE": "true"})
    assert (find_entry_point(settings, tmp_path) == "model.py") == is_handler
    if not is_handler:
        assert find_entry_point(settings, tmp_path, "f") == "model.py"
    assert find_entry_point(read_settings(environ={}), tmp_path) is None


@pytest.mark.parametrize("environ", [{}, {"LORAMILL_ENABLE_LORA": "true"}, {"LORAMILL_CUSTOM_CODE": "true"}])
def test_no_process_is_started_where_nothing_could_be_formatted(tmp_path: Path, environ) -> None:
    async def play() -> None:
        settings = read_settings(environ=environ)
        async with open_formatters(settings, tmp_path, weights="", environ={}) as formatters:
            assert formatters is None

    asyncio.run(play())


def test_rows_are_given_back_when_no_process_can_be_started_any_more(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        f"{MARKS}@input_formatter\ndef f(p, **_):\n    import os\n    os._exit(1)\n"
    )

    async def play() -> None:
        async with formatters_of(tmp_path) as formatters:
            formatters._handler._sleep = lambda _: asyncio.sleep(0)
            own = (await formatters.of(None)).input
            with pytest.raises(HandlerRefusedRow, match="exit code 1"):
                await run(formatters, own, inputs="")
            (tmp_path / "model.py").write_text("raise OSError('it is gone')\n")
            for words in ("it is gone", "has been stopped"):
                with pytest.raises(EngineFailed, match=words):
                    await run(formatters, own, inputs="")
            with pytest.raises(EngineFailed):
                await formatters.wait()

    asyncio.run(play())


def test_only_so_many_modules_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formatter_host, "MOST_LOADED", 2)
    monkeypatch.setattr(formatter_host, "_adapters", OrderedDict())
    for number in range(4):
        folder = adapter_in(tmp_path, "f = lambda r: {}\nf.is_output_formatter = True\n", version=str(number))
        given = formatter_host.Input()
        given.content.add("key", f"a/{number}".encode())
        given.content.add("folder", str(folder.path).encode())
        given.content.add("data", b"{}")
        assert formatter_host.format_output(given).code == 200
    assert list(formatter_host._adapters) == ["a/2", "a/3"]
