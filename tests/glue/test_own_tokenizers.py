"""Rows of an adapter that brings a tokenizer are read and written with it, from job to result line."""

import asyncio
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests import parity, tiny
from tests.glue.support import make_job, make_runner, run_rows
from tests.glue.test_bridge import make_core
from worker import wire
from worker.adapters import AdapterDirectory
from worker.bridge import Bridge
from worker.core import Core

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


def test_trouble_of_the_disk_says_nothing_about_a_tokenizer(core, base, tmp_path, monkeypatch):
    tiny.make_adapter(tmp_path / "one", base, target_modules=["q_proj"])
    tiny.write_tokenizer(tmp_path / "one", NAMES[:-2])

    def broken(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("worker.engine.adapter_tokenizers.AutoTokenizer.from_pretrained", broken)
        with pytest.raises(OSError, match="Too many open files"):
            core.tokenizers.read(tmp_path / "one")
    assert core.tokenizers.read(tmp_path / "one") is not None
