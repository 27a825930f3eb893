import contextlib
import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_sync.errors import InvalidAdapter
from adapters_sync.folder import carried_files, check_folder
from adapters_sync.header import MAX_HEADER_BYTES, read_header
from tests.sync.builders import CONFIG, WEIGHTS, adapter_files, config, safetensors, weights, write_folder


def doubled(tensors, data):
    """A file whose header has its one entry twice."""
    entry = json.dumps(tensors)[1:-1]
    header = f"{{{entry}, {entry}}}".encode()
    return struct.pack("<Q", len(header)) + header + data


ONE = {"lora_A": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def refusal(tmp_path, files, **kwargs):
    with pytest.raises(InvalidAdapter) as error:
        check_folder(write_folder(tmp_path / "a", files), **kwargs)
    assert str(error.value) == error.value.reason
    return error.value.reason


def test_a_good_folder_is_summed_up(tmp_path):
    folder = write_folder(
        tmp_path / "a", adapter_files(rank_pattern={"k_proj": 9}, base_model_name_or_path="base")
    )
    summary = check_folder(folder, max_rank=9)
    assert (summary.rank, summary.tensors, summary.base_model) == (9, 2, "base")
    assert summary.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_real_safetensors_files_pass(tmp_path):
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save

    tensors = {
        "x.lora_A.weight": numpy.zeros((4, 8), "float32"),
        "x.lora_B.weight": numpy.ones((8, 4), "float16"),
    }
    check_folder(write_folder(tmp_path / "a", {CONFIG: config(), WEIGHTS: save(tensors)}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"; only LORA'),
        ({"peft_type": ...}, "peft_type is missing"),
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": True}, "r is true"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": "4"}, 'r is "4"'),
        ({"r": ...}, "r is missing"),
        ({"r": 17}, "r is 17; the limit is 16"),
        ({"rank_pattern": {"q": 64}}, "rank_pattern['q'] is 64; the limit is 16"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]"),
        ({"lora_alpha": "x"}, "lora_alpha is"),
        ({"lora_alpha": 10**400}, "it must be a finite number"),
        ({"r": 10**400}, "r is 1000"),
        ({"alpha_pattern": {"q": True}}, "alpha_pattern['q'] is true"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": [3]}, "target_modules is [3]"),
        ({"target_modules": ["m"] * 10_001}, "names 10001 modules; the limit is 10000"),
    ],
)
def test_a_bad_configuration_is_refused_by_field_value_and_limit(tmp_path, changes, reason):
    assert reason in refusal(tmp_path, adapter_files(**changes), max_rank=16)


@pytest.mark.parametrize("data", [b"", b"[]", b"nope", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, data):
    assert "is not a JSON object" in refusal(tmp_path, {CONFIG: data, WEIGHTS: weights()})


def test_a_huge_configuration_is_refused_unread(tmp_path):
    files = {CONFIG: config(note="x" * (1 << 20)), WEIGHTS: weights()}
    assert "the limit is 1048576" in refusal(tmp_path, files)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path, name):
    files = {key: data for key, data in adapter_files().items() if key != name}
    assert refusal(tmp_path, files) == f"{name} is missing"


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    assert "save them as adapter_model.safetensors" in refusal(
        tmp_path, {CONFIG: config(), "adapter_model.bin": b"x"}
    )


def test_a_link_is_no_part_of_an_adapter(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(weights())
    folder = write_folder(tmp_path / "a", {CONFIG: config()})
    (folder / WEIGHTS).symlink_to(outside)
    with pytest.raises(InvalidAdapter, match="is a link"):
        check_folder(folder)
    assert list(carried_files(folder)) == [CONFIG]


def test_a_named_pipe_in_the_folder_is_not_opened(tmp_path):
    folder = write_folder(tmp_path / "a")
    os.mkfifo(folder / "pipe.json")
    check_folder(folder)


def test_every_safetensors_file_is_checked(tmp_path):
    files = adapter_files() | {"extra/more.safetensors": weights()[:-1]}
    assert "more.safetensors" in refusal(tmp_path, files)


def test_tensors_that_are_no_lora_are_refused(tmp_path):
    plain = safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    assert "none of its 1 tensors is a LoRA tensor" in refusal(tmp_path, {CONFIG: config(), WEIGHTS: plain})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated or is not safetensors"),
        (b"\x01", "truncated or is not safetensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "does not fit in a file of 10 bytes"),
        (safetensors(ONE, bytes(7)), "describes 8 bytes of tensors and the file holds 7"),
        (safetensors(ONE, bytes(9)), "describes 8 bytes of tensors and the file holds 9"),
        (struct.pack("<Q", 4) + b"nope", "not a JSON object of tensors"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object of tensors"),
        (safetensors({"__metadata__": {"a": 1}} | ONE, bytes(8)), "not a JSON object of tensors"),
        (safetensors({"x": 3}, b""), "tensor 'x'"),
        (safetensors({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets"),
        (safetensors({"x": ONE["lora_A"] | {"dtype": "Q4"}}, bytes(8)), "unknown dtype 'Q4'"),
        (
            safetensors({"x": ONE["lora_A"] | {"shape": [3]}}, bytes(8)),
            "needs 12 bytes; its data_offsets give it 8",
        ),
        (safetensors({"x": ONE["lora_A"] | {"shape": [-2]}}, bytes(8)), "shape"),
        (safetensors({"x": ONE["lora_A"] | {"data_offsets": [8, 0]}}, bytes(8)), "give it -8"),
        (safetensors({"x": ONE["lora_A"] | {"data_offsets": [4, 12]}}, bytes(12)), "begins at offset 4"),
        (
            safetensors(ONE | {"y": ONE["lora_A"]}, bytes(8)),
            "begins at offset 0, and the one before it ends at 8",
        ),
        (safetensors({"x": ONE["lora_A"] | {"shape": [1] * 9}}, bytes(8)), "length <= 8"),
        (safetensors({"x": ONE["lora_A"] | {"shape": [1 << 63]}}, bytes(8)), "<= 9223372036854775807"),
        (safetensors({"x": ONE["lora_A"] | {"shape": [int("9" * 4000)] * 8}}, b""), "<= 9223372036854775807"),
        (struct.pack("<Q", 1 << 63) + b"{}", "a header of 9223372036854775808 bytes does not fit"),
        (doubled(ONE, bytes(8)), "has the name 'lora_A' twice"),
    ],
)
def test_a_file_that_is_not_whole_and_sane_is_refused(tmp_path, data, reason):
    path = tmp_path / WEIGHTS
    path.write_bytes(data)
    with pytest.raises(InvalidAdapter) as error:
        read_header(path)
    assert reason in str(error.value)


def test_a_header_over_the_cap_is_refused_unread(tmp_path):
    path = tmp_path / WEIGHTS
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse
    with pytest.raises(InvalidAdapter, match=f"the limit is {MAX_HEADER_BYTES}"):
        read_header(path)


@settings(max_examples=60)
@given(cut=st.integers(0, len(weights()) - 1))
def test_no_truncated_file_passes(tmp_path_factory, cut):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(weights()[:cut])
    with pytest.raises(InvalidAdapter):
        read_header(path)


@settings(max_examples=150)
@given(data=st.binary(max_size=200))
def test_no_bytes_raise_anything_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(InvalidAdapter):
        read_header(path)


def test_no_rank_is_too_large_to_be_refused(tmp_path):
    assert "r is 1000000; the limit is 16384" in refusal(tmp_path, adapter_files(r=10**6))
