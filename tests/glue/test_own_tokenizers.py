"""Rows of an adapter that brings a tokenizer are read and written with it, from job to result line."""

import asyncio
import gc
import json
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapters_sync.layout import MODEL_PY, PUBLISHED_MANIFEST
from tests import parity, tiny
from tests.glue.support import make_job, make_runner, run_rows
from tests.glue.test_bridge import make_core
from worker import wire
from worker.adapters.directory import AdapterDirectory
from worker.bridge import Bridge
from worker.core import Core
from worker.engine.adapters.tokenizers import AdapterTokenizers
from worker.engine.tokenizer import Tokenizer
from worker.errors import AdapterInvalid
from worker.jobs import AdapterKey

ROWS = 272
NAMES = [f"<new{number}>" for number in range(parity.NEW_TOKENS)]
TEMPLATE = "{% for m in messages %}[{{ m.content }}]<new1>{% endfor %}"


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `own`, with tokens and a tokenizer, `alike`, with the same files, and `plain`."""
    root = tmp_path_factory.mktemp("own")
    with warnings.catch_warnings(action="ignore"):
        for number, (name, kind) in enumerate({"own": "added tokens", "plain": "LoRA"}.items()):
            shape, feature = parity.SHAPES["llama"], parity.FEATURES[kind]
            parity.tune(tiny.load_base(base), shape, feature, root / name, number)
    tiny.write_tokenizer(root / "own", NAMES, template=TEMPLATE)
    return root


@pytest.fixture(scope="module")
def core(base: Path) -> Core:
    return make_core(base)


def lines_of(core: Core, folder: Path, rows: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    async def scenario() -> list[dict[str, Any]]:
        async with Bridge(core.engine, core.store) as bridge:
            directory = AdapterDirectory(folder, 0.0)
            tokenizer = core.base.tokenizer
            runner = make_runner(bridge, tokenizer, directory, own_tokenizer=core.tokenizers.of)
            job = make_job(inputs=rows, **fields)
            encoded = wire.encode_rows(job, await run_rows(runner, job), base_model="m")
            return [json.loads(line) for line in encoded.splitlines()]

    return asyncio.run(asyncio.wait_for(scenario(), 60))


def both(**row: Any) -> list[dict[str, Any]]:
    return [{**row, "adapter": "own"}, {**row, "adapter": "plain"}, row]


def test_prompt_and_answer_are_spelled_by_the_adapters_own_tokenizer(core, folder):
    parameters = {"max_new_tokens": 2, "decoder_input_details": True, "logit_bias": {str(ROWS): 100}}
    (line,) = lines_of(core, folder, [{"input": "a<new2>", "adapter": "own"}], parameters=parameters)
    assert [one["text"] for one in line["details"]["prefill"]] == ["a", "<new2>"]
    assert line["details"]["prefill"][1]["id"] == ROWS + 2
    assert line["generated_text"] == "<new0><new0>"
    assert [one["text"] for one in line["details"]["tokens"]] == ["<new0>", "<new0>"]


def test_others_read_the_same_text_with_the_base_models(core, folder):
    lines = lines_of(core, folder, both(input="a<new2>"), parameters={"max_new_tokens": 1})
    assert [line["usage"]["prompt_tokens"] for line in lines] == [2, 7, 7]


def test_a_chat_goes_through_the_adapters_own_template(core, folder):
    messages = [{"role": "user", "content": "x"}]
    parameters = {"max_new_tokens": 1, "return_full_text": True}
    lines = lines_of(core, folder, both(messages=messages), parameters=parameters)
    assert lines[0]["generated_text"].startswith("[x]<new1>")
    assert lines[0]["usage"]["prompt_tokens"] == 4
    assert lines[1]["generated_text"].startswith("<user>x<assistant>")
    assert lines[2]["generated_text"].startswith("<user>x<assistant>")


def test_scores_are_of_the_adapters_own_tokens(core, folder):
    lines = lines_of(core, folder, both(input="a", target="<new2>"), task="score")
    assert [len(line["token_logprobs"]) for line in lines] == [1, 6, 6]


def test_tokens_of_the_adapter_are_an_error_of_other_rows_alone(core, folder):
    parameters = {"max_new_tokens": 1, "allowed_token_ids": [ROWS]}
    lines = lines_of(core, folder, both(input="a"), parameters=parameters)
    assert lines[0]["generated_text"] == "<new0>"
    assert [line["error"]["code"] for line in lines[1:]] == ["invalid_parameters"] * 2
    assert "adapter plain has 272 tokens" in lines[1]["error"]["message"]
    assert "the base model has 272 tokens" in lines[2]["error"]["message"]
    core.engine.check_integrity()


def test_a_tokenizer_that_cannot_be_read_fails_its_rows_by_name(core, folder, base, tmp_path):
    tiny.make_adapter(tmp_path / "broken", base, target_modules=["q_proj"])
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    rows = [{"input": "a", "adapter": "broken"}, {"input": "a"}]
    lines = lines_of(core, tmp_path, rows, parameters={"max_new_tokens": 1})
    assert lines[0]["error"]["code"] == "adapter_invalid"
    assert "Adapter broken is invalid: its tokenizer cannot be read" in lines[0]["error"]["message"]
    assert lines[1]["error"] is None


def test_folders_with_the_same_files_share_one_tokenizer(core, folder, base, tmp_path):
    keys = []
    for name in ("one", "other", "third"):
        tiny.make_adapter(tmp_path / name, base, target_modules=["q_proj"])
        tiny.write_tokenizer(tmp_path / name, NAMES[:-1] if name == "third" else NAMES)
        keys.append(core.tokenizers.read(tmp_path / name))
    assert keys[0] is keys[1]
    assert keys[0] is not keys[2]
    assert core.tokenizers.read(folder / "plain") is None


def test_a_template_in_a_file_of_any_name_makes_another_tokenizer(core, base, tmp_path):
    found = []
    for name in ("one", "other"):
        tiny.make_adapter(tmp_path / name, base, target_modules=["q_proj"])
        tiny.write_tokenizer(tmp_path / name, NAMES)
        (tmp_path / name / "additional_chat_templates").mkdir()
        (tmp_path / name / "additional_chat_templates" / "more.jinja").write_text(f"I am {name}")
        found.append(core.tokenizers.read(tmp_path / name))
    assert found[0] is not found[1]


def test_what_the_mirror_puts_beside_an_adapter_says_nothing_about_its_tokenizer(core, base, tmp_path):
    found = []
    for name in ("one", "other"):
        tiny.make_adapter(tmp_path / name, base, target_modules=["q_proj"])
        tiny.write_tokenizer(tmp_path / name, NAMES)
        (tmp_path / name / PUBLISHED_MANIFEST).write_text(json.dumps({"name": name}))
        (tmp_path / name / MODEL_PY).write_text(f"name = {name!r}")
        found.append(core.tokenizers.read(tmp_path / name))
    assert found[0] is found[1]


def test_trouble_of_the_disk_says_nothing_about_a_tokenizer(core, base, tmp_path, monkeypatch):
    tiny.make_adapter(tmp_path / "one", base, target_modules=["q_proj"])
    tiny.write_tokenizer(tmp_path / "one", NAMES[:-2])

    def broken(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("worker.engine.adapters.tokenizers.AutoTokenizer.from_pretrained", broken)
        with pytest.raises(OSError, match="Too many open files"):
            core.tokenizers.read(tmp_path / "one")
    assert core.tokenizers.read(tmp_path / "one") is not None


def write_with(folder: Path, base: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An adapter whose tokenizer.json had something changed."""
    tiny.make_adapter(folder, base, target_modules=["q_proj"])
    tiny.write_tokenizer(folder, NAMES, template=TEMPLATE)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def test_a_regular_expression_that_the_base_has_not_is_refused_at_load(core, base, tmp_path):
    def change(content: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}

    write_with(tmp_path / "slow", base, change)
    rows = [{"input": "a" * 40, "adapter": "slow"}, {"input": "a", "adapter": "slow"}, {"input": "a"}]
    lines = lines_of(core, tmp_path, rows, parameters={"max_new_tokens": 1})
    for line in lines[:2]:
        assert line["error"]["code"] == "adapter_invalid"
        assert "a regular expression that the base model's has not: (a+)+$" in line["error"]["message"]
    assert lines[2]["error"] is None
    with pytest.raises(AdapterInvalid, match="regular expression"):
        core.tokenizers.read(tmp_path / "slow")


def test_a_regular_expression_that_is_refused_is_never_run(base, tmp_path, monkeypatch):
    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}

    folder, own = write_with(tmp_path / "slow", base, change), Tokenizer(tiny.tokenizer())
    monkeypatch.setattr(PreTrainedTokenizerFast, "encode", lambda *_, **__: pytest.fail("run"))
    tokenizers, key = AdapterTokenizers(own), AdapterKey("slow", "1")
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=r"Adapter slow is invalid: .* regular expression"):
            tokenizers.of(key, folder)
        folder = tmp_path / "not looked at again"


def test_regular_expressions_of_the_base_are_allowed(base, tmp_path):
    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "b+"}, "content": "b"}

    folder = write_with(tmp_path / "like", base, change)
    own = Tokenizer(AutoTokenizer.from_pretrained(folder))
    assert own.patterns == {"b+"}
    assert AdapterTokenizers(own).read(folder) is not None
    with pytest.raises(AdapterInvalid, match=r"b\+"):
        AdapterTokenizers(Tokenizer(tiny.tokenizer())).read(folder)


def test_a_regular_expression_is_refused_before_anything_is_made_of_it(core, base, tmp_path, monkeypatch):
    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        content["added_tokens"][-1]["normalized"] = True

    folder = write_with(tmp_path / "slow", base, change)
    monkeypatch.delattr("worker.engine.adapters.tokenizers.AutoTokenizer.from_pretrained")
    with pytest.raises(AdapterInvalid, match="regular expression"):
        core.tokenizers.read(folder)


def test_a_file_that_is_too_large_for_a_tokenizer_is_not_read(core, base, tmp_path):
    tiny.make_adapter(tmp_path / "large", base, target_modules=["q_proj"])
    with (tmp_path / "large" / "tokenizer.json").open("wb") as file:
        file.truncate(2**28)
    with pytest.raises(AdapterInvalid, match=r"tokenizer\.json has 268435456 bytes, 134217728 are allowed"):
        core.tokenizers.read(tmp_path / "large")


def test_the_tokenizers_that_were_used_last_stay_in_memory(base, tmp_path):
    for name in ("a", "b", "c"):
        tiny.make_adapter(tmp_path / name, base, target_modules=["q_proj"])
        tiny.write_tokenizer(tmp_path / name, NAMES, template=name)
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("tokenizer*.json"))
    tokenizers = AdapterTokenizers(Tokenizer(tiny.tokenizer()), kept_bytes=2 * size)
    seen = {name: weakref.ref(tokenizers.of(AdapterKey(name, "1"), tmp_path / name)) for name in ("a", "b")}
    tokenizers.of(AdapterKey("a", "1"), tmp_path / "a")
    tokenizers.of(AdapterKey("c", "1"), tmp_path / "c")
    gc.collect()
    assert [name for name, tokenizer in seen.items() if tokenizer() is not None] == ["a"]
    assert tokenizers.of(AdapterKey("b", "1"), tmp_path / "b") is not None


def test_many_threads_load_a_kind_once_and_others_do_not_wait(base, tmp_path, monkeypatch):
    for name in ("slow", "quick"):
        tiny.make_adapter(tmp_path / name, base, target_modules=["q_proj"])
        tiny.write_tokenizer(tmp_path / name, NAMES, template=name)
    tokenizers, go, loads = AdapterTokenizers(Tokenizer(tiny.tokenizer())), threading.Event(), []
    load = AutoTokenizer.from_pretrained

    def loading(folder: Path, **options: Any) -> Any:
        loads.append(folder.name)
        assert folder.name == "quick" or go.wait(60)
        return load(folder, **options)

    monkeypatch.setattr("worker.engine.adapters.tokenizers.AutoTokenizer.from_pretrained", loading)
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(tokenizers.read, tmp_path / "slow") for _ in range(2)]
        assert pool.submit(tokenizers.read, tmp_path / "quick").result(60) is not None
        go.set()
        assert slow[0].result(60) is slow[1].result(60)
    assert sorted(loads) == ["quick", "slow"]
