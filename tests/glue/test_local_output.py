"""A file of results while it is being made: whatever stops it, every line is there once in the end."""

import fcntl
import gzip
import hashlib
import itertools
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.glue.support import PROVENANCE, Died, make_job
from worker import wire
from worker.errors import InvalidMessage, LoramillError
from worker.jobs import FinishReason, Row, RowResult
from worker.local import output as local_output
from worker.local.output import manifest_path, open_output
from worker.wire.manifest import summarize
from worker.wire.output import LineWriter

ASKED = {"sha256 of the input": "ab", "parameters": {"seed": 1}, "adapter": None}
ROWS = 7


def result(index: int) -> RowResult:
    row = Row(index=index, id=f"ä{index}", text="x")
    return RowResult(row=row, text=f"line\n{index}" * (index + 1), finish_reason=FinishReason.LENGTH)


def lines_of(line_format: str = "native") -> list[bytes]:
    writer = LineWriter(make_job(output={"uri": "s3://out/jobs/", "format": line_format}), base_model="m")
    return [writer.line(result(index)) for index in range(ROWS)]


LINES = lines_of()


def summary(file, tally):
    return summarize(
        make_job(),
        [(file, tally)],
        base_model=PROVENANCE.base_model,
        worker=PROVENANCE.worker,
        started_at=0.0,
        finished_at=1.0,
        software_version=PROVENANCE.software_version,
    )


def complete(target: Path, *, overwrite: bool = False, line_format: str = "native") -> int:
    """One run that sees it through; how many lines were there before."""
    with open_output(target, overwrite=overwrite) as output:
        output.begin(ASKED, line_format)
        before = output.rows
        for line in lines_of(line_format)[before:]:
            output.add(line)
        output.finish(summary)
    return before


def leave(target: Path, rows: int) -> Path:
    """What a run leaves that is stopped after so many rows; where its lines are."""
    with open_output(target) as output:
        output.begin(ASKED, "native")
        for line in LINES[:rows]:
            output.add(line)
    return target.with_name(f".{target.name}.partial")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_what_is_complete_is_whole_with_its_manifest_and_nothing_else(tmp_path, name):
    target = tmp_path / name
    assert complete(target) == 0
    data = target.read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data) == b"".join(LINES)
    manifest = wire.decode_manifest(manifest_path(target).read_bytes())
    (file,) = manifest.outputs
    assert (file.uri, file.rows, file.sha256) == (str(target), ROWS, hashlib.sha256(data).hexdigest())
    assert manifest.request_counts.completed == ROWS
    assert names(tmp_path) == {name, f"{name}.manifest.json"}


def test_packed_results_are_the_same_bytes_every_time(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        complete(tmp_path / folder / "out.gz")
    assert (tmp_path / "a/out.gz").read_bytes() == (tmp_path / "b/out.gz").read_bytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(b"".join(LINES))), st.sampled_from([b"", b"\0" * 9, b"\0\n\0", b"{}\n", b"\n"]))
def test_a_file_cut_anywhere_goes_on_after_its_last_whole_line(at, garbage):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.jsonl"
        partial = leave(target, ROWS)
        left = partial.read_bytes()[:at] + garbage
        partial.write_bytes(left)
        assert complete(target) == sum(left.startswith(b"".join(LINES[: n + 1])) for n in range(ROWS))
        assert target.read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("line_format", ["native", "openai"])
def test_lines_of_each_format_are_taken_up_again(tmp_path, line_format):
    target = tmp_path / "out.jsonl"
    with open_output(target) as output:
        output.begin(ASKED, line_format)
        for line in lines_of(line_format)[:3]:
            output.add(line)
    assert complete(target, line_format=line_format) == 3
    assert target.read_bytes() == b"".join(lines_of(line_format))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_a_run_that_dies_at_any_step_of_its_end_is_completed_by_the_next(tmp_path, name, monkeypatch):
    for last in itertools.count():
        folder = tmp_path / str(last)
        folder.mkdir()
        target, left = folder / name, [last]

        def dying(call, left=left):
            def called(*arguments, **options):
                if not left[0]:
                    raise Died
                left[0] -= 1
                return call(*arguments, **options)

            return called

        leave(target, ROWS)
        with monkeypatch.context() as patch:
            for kind in ("replace", "unlink"):
                patch.setattr(Path, kind, dying(getattr(Path, kind)))
            patch.setattr(os, "fsync", dying(os.fsync))
            try:
                complete(target)
            except Died:
                pass
            else:
                break
        if target.exists():
            assert manifest_path(target).exists()
            with pytest.raises(InvalidMessage, match="it exists"):
                complete(target)
        else:
            assert complete(target) == ROWS
        data = target.read_bytes()
        assert (gzip.decompress(data) if name.endswith(".gz") else data) == b"".join(LINES)
    assert last > 5


def test_what_exists_is_replaced_only_when_told_and_only_at_the_end(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("precious")
    with pytest.raises(InvalidMessage, match=r"out\.jsonl: it exists; --overwrite"), open_output(target):
        pass
    assert names(tmp_path) == {"out.jsonl"}
    with open_output(target, overwrite=True) as output:
        output.begin(ASKED, "native")
        output.add(LINES[0])
        assert target.read_text() == "precious"
    assert complete(target, overwrite=True) == 1
    assert target.read_bytes() == b"".join(LINES)


def test_lines_about_something_else_are_refused_and_kept_and_what_differs_is_named(tmp_path):
    target = tmp_path / "out.jsonl"
    partial = leave(target, 2)
    other = ASKED | {"parameters": {"seed": 2}, "adapter": "red"}
    with open_output(target) as output, pytest.raises(InvalidMessage) as refused:
        output.begin(other, "native")
    assert "left 2 rows" in str(refused.value)
    assert 'parameters was {"seed":1} and is {"seed":2}' in str(refused.value)
    assert 'adapter was null and is "red"' in str(refused.value)
    assert "sha256" not in str(refused.value)
    assert partial.read_bytes() == b"".join(LINES[:2])
    assert complete(target) == 2


def test_lines_of_which_nobody_knows_what_they_are_about_are_refused(tmp_path):
    target = tmp_path / "out.jsonl"
    about = leave(target, 2).with_name(".out.jsonl.partial.json")
    for damage in (lambda: about.write_text("{"), about.unlink):
        damage()
        with open_output(target) as output, pytest.raises(InvalidMessage, match="nobody knows"):
            output.begin(ASKED, "native")


def test_a_restart_gives_the_lines_up(tmp_path):
    target = tmp_path / "out.jsonl"
    leave(target, 2)
    with open_output(target) as output:
        run = output.begin(ASKED | {"adapter": "red"}, "native", restart=True)
        assert output.rows == 0
        output.add(LINES[0])
    with open_output(target) as output:
        assert output.begin(ASKED | {"adapter": "red"}, "native") == run
        assert output.rows == 1


def test_a_run_goes_on_as_the_one_that_began(tmp_path):
    target = tmp_path / "out.jsonl"
    with open_output(target) as output:
        first = output.begin(ASKED, "native")
        output.add(LINES[0])
    with open_output(target) as output:
        second = output.begin(dict(reversed(ASKED.items())), "native")
    assert (second.created_at, second.digest) == (first.created_at, first.digest)


def test_a_run_without_a_line_leaves_nothing(tmp_path):
    target = tmp_path / "out.jsonl"
    with open_output(target) as output:
        output.begin(ASKED, "native")
    assert names(tmp_path) == set()


def test_two_runs_are_never_at_work_on_one_file(tmp_path):
    target = tmp_path / "out.jsonl"
    (tmp_path / "link").symlink_to("out.jsonl")
    with open_output(target) as output:
        output.begin(ASKED, "native")
        for name in ("out.jsonl", "link"):
            with pytest.raises(LoramillError, match="another run is at work"), open_output(tmp_path / name):
                pass
        with open_output(tmp_path / "other.jsonl"):
            pass
    complete(target)


def test_a_lock_on_what_the_other_run_has_just_removed_is_none(tmp_path, monkeypatch):
    target, real, removed = tmp_path / "out.jsonl", fcntl.flock, []

    def flock(descriptor, how):
        if not removed:  # the other run completes just now
            removed.append(descriptor)
            target.with_name(".out.jsonl.partial.json").unlink()
        real(descriptor, how)

    monkeypatch.setattr(local_output.fcntl, "flock", flock)
    with open_output(target) as output:
        with pytest.raises(LoramillError, match="another run"), open_output(target):
            pass
        output.begin(ASKED, "native")
        output.add(LINES[0])
    assert complete(target) == 1


def test_what_comes_to_be_meanwhile_is_not_replaced_and_no_line_is_lost(tmp_path):
    target = tmp_path / "out.jsonl"
    leave(target, ROWS)
    with open_output(target) as output:
        output.begin(ASKED, "native")
        target.write_text("precious")
        with pytest.raises(InvalidMessage, match="it exists"):
            output.finish(summary)
    assert target.read_text() == "precious"
    assert complete(target, overwrite=True) == ROWS
    assert target.read_bytes() == b"".join(LINES)


def test_a_full_disk_is_an_error_that_names_the_file_and_what_was_written_counts(tmp_path, monkeypatch):
    target, real, room = tmp_path / "out.jsonl", os.write, [len(LINES[0]) + 5]

    def write(descriptor, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = real(descriptor, data[: room[0]])
        room[0] -= count
        return count

    with open_output(target) as output:
        output.begin(ASKED, "native")
        monkeypatch.setattr(local_output.os, "write", write)
        output.add(LINES[0])
        with pytest.raises(LoramillError, match=r"out\.jsonl: No space left"):
            output.add(LINES[1])
        assert output.rows == 1
    monkeypatch.undo()
    assert complete(target) == 1
    assert target.read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("place", ["missing/out.jsonl", "folder", "pipe"])
def test_a_place_that_can_be_no_file_is_refused(tmp_path, place):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidMessage, match="--output "), open_output(tmp_path / place, overwrite=True):
        pass
    assert names(tmp_path) == {"folder", "pipe"}


def test_a_link_to_the_output_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "out.jsonl").symlink_to("data/real.jsonl")
    complete(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").is_symlink()
    assert json.loads((tmp_path / "data/real.jsonl").read_bytes().splitlines()[0])["index"] == 0
