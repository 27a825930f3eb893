"""Uploads that are wrong, by mistake or on purpose: each is one invalid adapter, and all else goes on."""

import json
import struct

import pytest

from adapters_sync.header import MAX_HEADER_BYTES
from adapters_sync.inventory import Limits
from adapters_sync.layout import AdapterState, BaseModel, resolve, scan, write_base_model
from adapters_sync.report import FailureKind
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, safetensors, state_of, weights

LORA = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(text, data=b""):
    """A safetensors file with any text for a header."""
    return struct.pack("<Q", len(text)) + text + data


def file(data):
    """An adapter whose weights these are."""
    return {CONFIG: config(), WEIGHTS: data}


def tensor(**changes):
    return file(safetensors({"lora_A": LORA | changes}, bytes(8)))


TWO = json.dumps({"lora_A": LORA})[1:-1]
CONTENTS = {
    "header of 2^63 bytes": (file(struct.pack("<Q", 1 << 63) + b"{}"), "does not fit in a file of 10 bytes"),
    "header of 2^64 - 1 bytes": (file(b"\xff" * 64), "does not fit in a file of 64 bytes"),
    "header over the cap": (file(header(b" " * (MAX_HEADER_BYTES + 1))), f"the limit is {MAX_HEADER_BYTES}"),
    "negative offsets": (tensor(data_offsets=[-8, 0]), "tensor 'lora_A'"),
    "offsets that no file has": (tensor(data_offsets=[1 << 62, (1 << 62) + 8]), "begins at offset"),
    "offsets of 4000 digits": (tensor(data_offsets=[0, int("9" * 4000)]), "tensor 'lora_A'"),
    "a hundred thousand dimensions": (tensor(shape=[1 << 60] * 100_000), "tensor 'lora_A'"),
    "a shape that overflows": (tensor(shape=[1 << 62, 1 << 62]), "its data_offsets give it 8"),
    "overlapping tensors": (
        file(safetensors({"lora_A": LORA, "lora_B": LORA}, bytes(8))),
        "begins at offset 0, and the one before it ends at 8",
    ),
    "one name twice": (
        file(header(f"{{{TWO}, {TWO}}}".encode(), bytes(8))),
        "the header has the name 'lora_A' twice",
    ),
    "header nested deeply": (file(header(b"[" * 100_000)), "not a JSON object of tensors"),
    "a name with a line break": (
        file(safetensors({"lora_A\n\x1b[2J": LORA | {"shape": [3]}}, bytes(8))),
        r"tensor 'lora_A\n\x1b[2J'",
    ),
    "weights without a byte": (file(b""), "is truncated or is not safetensors"),
    "half the weights": (file(weights()[:-64]), "truncated or damaged"),
    "a pickle by another name": (file(b"\x80\x04\x95" + b"x" * 100), "is not safetensors"),
    "a configuration without a byte": ({CONFIG: b"", WEIGHTS: weights()}, "is not a JSON object"),
    "a configuration that is a list": ({CONFIG: b"[1]", WEIGHTS: weights()}, "is not a JSON object"),
    "a configuration that is no JSON": ({CONFIG: b"\x00\x01", WEIGHTS: weights()}, "is not a JSON object"),
    "a configuration nested deeply": ({CONFIG: b'{"r":' * 9999, WEIGHTS: weights()}, "is not a JSON object"),
    "a rank of a million": (adapter_files(r=10**6), "r is 1000000; the limit is 16384"),
    "a rank of 4000 digits": (adapter_files(r=int("9" * 4000)), "the limit is 16384"),
    "a rank in a pattern": (adapter_files(rank_pattern={"q": 10**6}), "rank_pattern['q'] is 1000000"),
    "a rank that is nested": (adapter_files(r=json.loads("[" * 900 + "]" * 900)), "it must be 1 or more"),
    "an alpha that no float holds": (adapter_files(lora_alpha=10**400), "it must be a finite number"),
    "another method": (adapter_files(peft_type="IA3"), 'peft_type is "IA3"'),
    "another base model": (
        file(safetensors({"base_model.model.other.lora_A.weight": LORA | {"shape": [1, 2]}}, bytes(8))),
        "is for a module that the base model does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENTS)
def test_bad_content_is_one_invalid_adapter_and_everything_else_goes_on(world, kind):
    files, reason = CONTENTS[kind]
    world.bucket.put_adapter("b", fill=1)
    world.sync()
    good = resolve(world.adapters_dir, "b")
    write_base_model(world.paths, BaseModel(modules={"q_proj": (4, 4)}))
    world.bucket.put_adapter("b", files)
    world.bucket.put_adapter("a", fill=2)
    world.bucket.put_adapter("c", fill=3)
    report = world.sync()
    assert report.ok
    assert report.failures == {FailureKind.INVALID: 1}
    status = state_of(world, "b")
    assert (status.state, status.version) == (AdapterState.INVALID, good.version)
    assert reason in status.reason
    assert len(status.reason) < 1000
    assert status.reason.isprintable()
    assert [one.name for one in scan(world.adapters_dir)] == ["a", "b", "c"]
    assert resolve(world.adapters_dir, "b") == good


KEYS = {
    "up and out": ("bad/../../escape/adapter_config.json", "bad", "a segment '..'"),
    "up to a neighbour": ("bad/../good/adapter_config.json", "bad", "a segment '..'"),
    "a name that goes up": ("../adapter_config.json", "..", "does not match"),
    "an absolute path": ("bad//etc/passwd.json", "bad", "an empty segment"),
    "a backslash": ("bad/..\\x.json", "bad", "a backslash"),
    "NUL": ("bad/x\0.json", "bad", "a control character"),
    "a segment that no disk holds": ("bad/" + "x" * 300 + ".json", "bad", "a segment of 305 bytes"),
    "too deep": ("bad/" + "x/" * 20 + "y.json", "bad", "levels deep"),
    "a hidden name": (".versions/x.json", ".versions", "does not match"),
    "the staging folder's": (".staging/x.json", ".staging", "does not match"),
    "case": ("Good/adapter_config.json", "Good", "differs from 'good' only in case"),
    "a file and its folder": ("bad/adapter_config.json/x.json", "bad", "both a file and the folder"),
    "a pickle": ("bad/adapter_model.bin", "bad", "the weights are a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_a_bad_key_is_one_invalid_adapter_and_everything_else_goes_on(world, tmp_path, kind):
    key, name, reason = KEYS[kind]
    world.bucket.put_adapter("good", fill=1)
    world.sync()
    if name == "bad":
        world.bucket.put(f"bad/{CONFIG}", config())
    if name == "bad" and kind != "a pickle":
        world.bucket.put(f"bad/{WEIGHTS}", weights())
    world.bucket.put(key, b"{}")
    world.bucket.put_adapter("later", fill=2)
    before = {path for path in tmp_path.rglob("*") if ".versions" not in path.parts}
    report = world.sync(passes=3, settle_seconds=0)
    assert report.ok
    status = next(one for one in report.adapters if one.name == name)
    assert status.state is AdapterState.INVALID
    assert reason in status.reason
    assert [one.name for one in scan(world.adapters_dir)] == ["good", "later"]
    after = {path for path in tmp_path.rglob("*") if ".versions" not in path.parts}
    assert after - before == {world.adapters_dir / "later"}


def test_names_that_differ_in_case_only_are_one_adapter_and_reasons_for_the_rest(world):
    for name in ("Sql", "sql", "SQL"):
        world.bucket.put_adapter(name)
    world.sync()
    assert [one.name for one in scan(world.adapters_dir)] == ["SQL"]
    for name in ("Sql", "sql"):
        status = state_of(world, name)
        assert (status.state, status.reason) == (AdapterState.INVALID, "differs from 'SQL' only in case")


def test_an_upload_of_too_many_files_is_one_invalid_adapter(world):
    world.bucket.put_adapter("good", fill=1)
    world.bucket.put_adapter("bad", adapter_files() | {f"{n}.txt": b"" for n in range(300)})
    report = world.sync(limits=Limits(adapter_files=256))
    assert report.published[0].startswith("good@")
    assert "more than 256 objects" in state_of(world, "bad").reason


def test_what_was_refused_is_fetched_once_and_not_at_every_pass(world):
    for number, (files, _) in enumerate(CONTENTS.values()):
        if sum(map(len, files.values())) < 1 << 20:
            world.bucket.put_adapter(f"a{number}", files)

    async def work(mirror):
        return [(await mirror.run_once()).failures for _ in range(2)]

    world.sync()
    write_base_model(world.paths, BaseModel(modules={"q_proj": (4, 4)}))
    first, second = world.with_mirror(work)
    assert first.keys() == {FailureKind.INVALID}
    assert second == {}
