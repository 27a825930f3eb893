import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_sync.names import (
    MAX_DEPTH,
    MAX_SEGMENT_BYTES,
    clash,
    fault_in_name,
    fault_in_path,
    folded,
    is_adapter_name,
    is_carried,
    shown,
    why_skipped,
)


@pytest.mark.parametrize("name", ["a", "0", "sql-v2", "A.b_c-d", "x" * 128, "a..b"])
def test_good_names_are_accepted(name):
    assert is_adapter_name(name)
    assert fault_in_name(name) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a b", "a/b", "é", "x" * 129, "a\n", "a\0", "٣"]
)
def test_bad_names_are_refused_and_quoted(name):
    assert not is_adapter_name(name)
    assert "does not match" in fault_in_name(name)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../x", "segment '..'"),
        ("a/../x", "segment '..'"),
        ("./x", "segment '.'"),
        ("a//x", "empty segment"),
        ("/x", "empty segment"),
        ("a/", "empty segment"),
        ("", "empty segment"),
        ("a\\b", "backslash"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\x85b", "control character"),
        ("é" * 128, f"segment of 256 bytes; the limit is {MAX_SEGMENT_BYTES}"),
        ("/".join("a" * (MAX_DEPTH + 1)), f"{MAX_DEPTH + 1} levels deep; the limit is {MAX_DEPTH}"),
        ("/".join(["x" * 250] * 5), "bytes; the limit is 1024"),
    ],
)
def test_bad_paths_are_refused_with_the_reason(path, reason):
    assert reason in fault_in_path(path)


@given(st.text(max_size=300))
def test_an_accepted_path_stays_inside_its_folder(path):
    if fault_in_path(path) is None:
        assert all(segment not in {"", ".", ".."} for segment in path.split("/"))
        assert "\\" not in path
        assert "\0" not in path
        assert len(path.encode()) <= 1024


@given(st.text(max_size=200))
def test_an_accepted_name_is_an_accepted_path_and_needs_no_quoting(name):
    if is_adapter_name(name):
        assert fault_in_path(name) is None
        assert name.isascii()
        assert unicodedata.normalize("NFC", name) == name


@pytest.mark.parametrize(
    "path",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.model",
        "merges.txt",
        "README.md",
        "LICENSE",
        "chat_template.jinja",
        "deep/er/tokenizer.json",
    ],
)
def test_configuration_weights_tokenizer_and_text_are_carried(path):
    assert why_skipped(path) is None
    assert is_carried(path)


@pytest.mark.parametrize(
    "path",
    [
        "adapter_model.bin",
        "optimizer.pt",
        "state.PKL",
        "x.pth",
        "x.ckpt",
        "x.pickle",
        "model.py",
        "logo.png",
        "run.sh",
        ".gitattributes",
        ".json",
        "a/.cache/x.json",
        "noextension",
        "manifest.json",
    ],
)
def test_pickles_code_and_the_rest_are_not_carried(path):
    assert why_skipped(path) is not None
    assert not is_carried(path)


def test_markers_are_no_content():
    assert not is_carried("_manifest.json")
    assert not is_carried("_SUCCESS")


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["README.md", "readme.md"], "only in case"),
        (["caf\u00e9.txt", "cafe\u0301.txt"], "only in case or Unicode form"),
        (["x.txt", "x.txt/y.txt"], "both a file and the folder"),
        (["X.txt", "x.txt/deep/y.txt"], "both a file and the folder"),
    ],
)
def test_paths_that_some_file_system_cannot_hold_together_clash(paths, reason):
    assert reason in clash(paths)


def test_ordinary_paths_do_not_clash():
    assert clash(["a.txt", "a/b.txt", "a/c.txt", "ab.txt"]) is None


@given(st.text())
def test_folding_is_stable(text):
    assert folded(folded(text)) == folded(text)


@given(st.text())
def test_shown_text_is_printable_and_short(text):
    assert shown(text).isascii()
    assert shown(text).isprintable()
    assert len(shown(text)) < 1100
