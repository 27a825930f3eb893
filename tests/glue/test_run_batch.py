"""`loramill run-batch` but for the engine: what it takes, what it refuses, and how it goes on."""

import asyncio
import gzip
import io
import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.glue.support import echo
from worker import cli as worker_cli
from worker import core as worker_core
from worker.cli import app
from worker.delivery.inputs import rows_of
from worker.errors import EngineFailed, LoramillError
from worker.local import input as local_input
from worker.local import rows as local_rows
from worker.local.output import LocalOutput, manifest_path, open_output
from worker.wire import decode_manifest

TEXTS = [f"row {number}" for number in range(9)]


class Engine:
    """In the place of the engine: says what it is given in capitals. `hook` sees a row before it is done."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.loaded = self.closed = 0
        self.hook = lambda row: None

    def build(self, settings, weights):
        assert Path(weights).is_dir()
        self.loaded += 1
        return self

    def close(self):
        self.closed += 1

    async def run(self, core, settings, job, source, *, emit, on_left):
        left = job.num_rows
        async for row in rows_of(job, source):
            self.hook(row)
            await asyncio.sleep(0)
            self.computed.append(row.index)
            await emit(echo(row))
            left -= 1
            on_left(left)


@pytest.fixture
def engine(monkeypatch):
    engine = Engine()
    monkeypatch.setattr(worker_core, "build_core", engine.build)
    monkeypatch.setattr(local_rows, "run_rows", engine.run)
    return engine


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Runs the command from `in.jsonl` to `out.jsonl`, with no settings but the given ones."""
    for name in [name for name in os.environ if name.startswith(("LORAMILL_", "OPTION_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # as the command would set it
    monkeypatch.setattr(worker_cli, "_open_many_files", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "in.jsonl").write_text("".join(f'{{"input": "{text}"}}\n\n' for text in TEXTS))

    def run(*arguments, source="in.jsonl", target="out.jsonl", model="model"):
        given = ["run-batch", "-i", source, "-o", target, "--model", model, *arguments]
        return CliRunner().invoke(app, list(map(str, given)))

    return run


def said(target: Path = Path("out.jsonl")) -> list[str]:
    data = target.read_bytes()
    lines = [
        json.loads(line) for line in (gzip.decompress(data) if target.suffix == ".gz" else data).splitlines()
    ]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return [line["generated_text"] for line in lines]


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def assert_refused(result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    *_, line = result.stderr.splitlines()
    assert line.startswith("loramill: "), line
    for word in words:
        assert word in line, line


def stop_after(engine: Engine, rows: int, error: Exception | None = None) -> None:
    """The engine fails once so many rows are done."""

    def hook(row) -> None:
        if row.index == rows:
            engine.hook = lambda row: None
            raise error or EngineFailed("the engine failed")

    engine.hook = hook


@pytest.mark.parametrize(
    ("source", "target"), [("in.jsonl", "out.jsonl"), ("in.jsonl.gz", "out.jsonl.gz"), ("-", "out.jsonl")]
)
def test_every_row_has_its_line_and_the_manifest_says_so(cli, engine, source, target, monkeypatch, tmp_path):
    data = Path("in.jsonl").read_bytes()
    Path("in.jsonl.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(local_input, "sys", type("sys", (), {"stdin": io.TextIOWrapper(io.BytesIO(data))}))
    result = cli(source=source, target=target)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    assert "loramill: 9 of 9 rows" in result.stderr
    assert said(Path(target)) == [text.upper() for text in TEXTS]
    manifest = decode_manifest(manifest_path(Path(target)).read_bytes())
    assert manifest.status == "completed"
    assert manifest.request_counts.total == 9
    assert manifest.input.uri == (source if source == "-" else str(tmp_path / source))
    assert manifest.outputs[0].uri == str(tmp_path / target)
    assert (manifest.base_model, manifest.job_id[:6]) == ("model", "batch-")
    assert not [name for name in names() if name.startswith(".")]


@pytest.mark.parametrize("rows", [0, 1, 4, 8])
def test_a_run_that_failed_goes_on_and_computes_no_row_twice(cli, engine, rows):
    stop_after(engine, rows)
    result = cli()
    assert_refused(result, "the engine failed", code=1)
    assert f"stopped: {rows} of 9 rows are done; the same command goes on" in result.stderr
    assert not Path("out.jsonl").exists()
    assert cli().exit_code == 0
    assert engine.computed == list(range(9))
    assert said() == [text.upper() for text in TEXTS]


def test_the_same_job_has_the_same_id_whenever_it_is_run(cli, engine):
    stop_after(engine, 3)
    for target in ("a.jsonl", "a.jsonl", "b.jsonl"):
        cli(target=target)
    cli("-p", "seed=1", target="c.jsonl")
    a, b, c = (decode_manifest(manifest_path(Path(f"{name}.jsonl")).read_bytes()) for name in "abc")
    assert a.job_id == b.job_id != c.job_id
    assert a.outputs[0].sha256 == b.outputs[0].sha256


def test_where_only_the_end_is_missing_nothing_is_loaded(cli, engine, monkeypatch):
    def finish(*_) -> None:
        raise LoramillError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(LocalOutput, "finish", finish)
        assert "stopped: 9 of 9 rows" in cli().stderr
    loaded = engine.loaded
    assert cli().exit_code == 0
    assert engine.loaded == loaded
    assert said() == [text.upper() for text in TEXTS]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(cli, engine, number):
    engine.hook = lambda row: os.kill(os.getpid(), number) if row.index == 5 else None
    result = cli()
    assert result.exit_code == 128 + number
    assert "stopped: 5 of 9 rows are done; the same command goes on" in result.stderr
    assert "Traceback" not in result.output
    engine.hook = lambda row: None
    assert cli().exit_code == 0
    assert engine.computed == list(range(9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_ends_the_run_too(cli, engine, number, monkeypatch):
    before = signal.getsignal(number)
    monkeypatch.setattr(worker_core, "build_core", lambda *_: os.kill(os.getpid(), number))
    result = cli()
    assert result.exit_code == 128 + number
    assert "stopped: 0 of 9 rows are done" in result.stderr
    assert signal.getsignal(number) == before
    assert not [name for name in names() if name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "seed=2"], ["parameters"]),
        (["--task", "score"], ["task"]),
        (["--format", "openai"], ["format"]),
        (["--input-format", "native"], ["input_format"]),
        (["--dtype", "bfloat16"], ["dtype"]),
        (["--max-model-len", "99"], ["max_model_len was null and is 99"]),
    ],
)
def test_what_was_asked_otherwise_before_is_refused_by_name(cli, engine, arguments, words):
    stop_after(engine, 4)
    cli()
    assert_refused(cli(*arguments), "left 4 rows", *words, "--restart")
    assert engine.loaded == 1
    result = cli(*arguments, "--restart")
    assert result.exit_code == 0, result.output
    assert [line for line in engine.computed if line == 0] == [0, 0]


def test_another_input_is_refused_until_it_is_what_it_was(cli, engine):
    stop_after(engine, 4)
    cli()
    before = Path("in.jsonl").read_bytes()
    Path("in.jsonl").write_bytes(before.replace(b"row 8", b"row 9"))
    assert_refused(cli(), "sha256 of the input", "--restart")
    Path("in.jsonl").write_bytes(before)
    assert cli().exit_code == 0
    assert engine.computed == list(range(9))


def test_an_input_that_is_written_to_meanwhile_stops_the_run(cli, engine, monkeypatch):
    monkeypatch.setattr(local_input, "_CHUNK_BYTES", 60)

    def hook(row) -> None:
        with Path("in.jsonl").open("a") as file:
            file.write('{"input": "late"}\n')

    engine.hook = hook
    assert_refused(cli(), "in.jsonl was changed while it was read", code=1)
    assert not Path("out.jsonl").exists()


def test_settings_that_change_no_line_may_be_others(cli, engine):
    stop_after(engine, 4)
    cli()
    assert cli("--max-num-seqs", "3", "--max-loras", "2", "--device", "cpu").exit_code == 0
    assert engine.computed == list(range(9))


def test_what_exists_is_replaced_when_told_and_a_run_may_be_stopped_meanwhile(cli, engine):
    Path("out.jsonl").write_text("precious")
    assert_refused(cli(), "out.jsonl: it exists; --overwrite replaces it")
    assert_refused(cli("--restart"), "--overwrite")
    assert engine.loaded == 0
    stop_after(engine, 4)
    cli("--overwrite")
    assert Path("out.jsonl").read_text() == "precious"
    assert cli("--overwrite").exit_code == 0
    assert engine.computed == list(range(9))
    assert said() == [text.upper() for text in TEXTS]


def test_a_restart_that_is_stopped_goes_on_without_the_flag(cli, engine):
    stop_after(engine, 4)
    assert "the same command without --restart goes on" in cli("--restart").stderr
    assert cli().exit_code == 0
    assert engine.computed == list(range(9))


def test_a_second_run_on_the_same_output_is_refused(cli, engine):
    with open_output(Path("out.jsonl")):
        assert_refused(cli(), "another run is at work", code=1)
    assert engine.loaded == 0


def test_rows_that_failed_are_lines_and_exit_code_1(cli, engine):
    Path("in.jsonl").write_text('"fine"\n{"input": \n{"input": "x", "parameters": {"sead": 1}}\n')
    result = cli()
    assert_refused(result, "2 of 3 rows failed: see their error", code=1)
    lines = [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]
    assert [line["error"] and line["error"]["code"] for line in lines] == [
        None,
        "invalid_line",
        "invalid_parameters",
    ]
    manifest = decode_manifest(manifest_path(Path("out.jsonl")).read_bytes())
    assert manifest.status == "completed_with_errors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "sead=1"], ["parameter 'sead' is unknown; the nearest known one is seed"]),
        (["-p", "seed"], ["not of the form NAME=JSON"]),
        (["--task", "guess"], ["task is 'guess'"]),
        (["--task", "score", "-p", "seed=1"], ["seed"]),
        (["--task", "score", "--format", "openai"], ["task is score and output.format is openai"]),
        (["--format", "csv"], ["output.format is 'csv'"]),
        (["--input-format", "csv"], ["input.format is 'csv'"]),
        (["--adapters", "nowhere"], ["--adapters: nowhere is not a folder"]),
        (["--adapter", "red"], ["--adapter red: no adapters are served"]),
        (["--adapters", ".", "--adapter", "red"], ["--adapter red: there is no such adapter in ."]),
        (["--max-loras", "0"], ["max_loras"]),
        (["--model-id", "s3://bucket/model/"], ["model_id: s3://bucket/model/ is in S3"]),
    ],
)
def test_misuse_is_told_before_anything_is_loaded(cli, engine, arguments, words):
    assert_refused(cli(*arguments), *words)
    assert engine.loaded == 0
    assert names() == ["in.jsonl", "model"]


def test_a_model_in_s3_is_for_workers(cli, engine):
    assert_refused(cli(model="s3://bucket/model/"), "model: s3://bucket/model/ is in S3")


@pytest.mark.parametrize("text", ["", "\n \n\r\n"])
def test_an_input_without_rows_is_refused_by_name(cli, engine, text):
    Path("in.jsonl").write_text(text)
    assert_refused(cli(), "--input in.jsonl: it has no rows")
    assert engine.loaded == 0
    assert names() == ["in.jsonl", "model"]


def test_input_and_output_are_two_files(cli, engine):
    before = Path("in.jsonl").read_bytes()
    assert_refused(cli("--overwrite", target="in.jsonl"), "it is the input")
    assert_refused(cli(source="missing"), "--input missing: No such file")
    assert_refused(cli(target="missing/out.jsonl"), "is not a folder")
    assert Path("in.jsonl").read_bytes() == before


def test_settings_beside_the_model_hold_here_too(cli, engine):
    Path("model/serving.properties").write_text("option.max_loras=none\n")
    assert_refused(cli(), "option.max_loras in serving.properties")


def test_a_model_that_devices_share_is_not_merged_into(cli, engine, monkeypatch):
    monkeypatch.setenv("LORAMILL_LORA_MODE", "merged")
    assert_refused(cli("--tensor-parallel-degree", "2"), "lora_mode: merged", "tensor_parallel_degree 2")
    assert engine.loaded == 0
    assert cli().exit_code == 0


@pytest.mark.parametrize("stop", [False, True])
def test_what_runs_beside_it_is_ended(cli, engine, stop):
    if stop:
        stop_after(engine, 4)
    cli()
    assert (engine.loaded, engine.closed) == (1, 1)


def test_help_names_the_flags_that_mean_something_here(cli):
    text = CliRunner().invoke(app, ["run-batch", "--help"], env={"COLUMNS": "200"}).stdout
    for flag in (
        "--input",
        "-i",
        "--output",
        "-o",
        "--adapters",
        "--model",
        "--device",
        "--max-loras",
        "--restart",
    ):
        assert f" {flag} " in text, flag
    for flag in ("--adapters-dir", "--queue-url", "--output-prefixes", "--http-port", "--sync", "--drain"):
        assert flag not in text, flag


def test_a_model_whose_handler_would_answer_is_refused(engine, cli, tmp_path, monkeypatch):
    (tmp_path / "model" / "model.py").write_text("raise AssertionError('it was run')\n")
    monkeypatch.setenv("LORAMILL_CUSTOM_CODE", "true")
    done = cli()
    assert done.exit_code == 2
    assert "custom_code: run-batch has only the engine" in done.output
    assert engine.loaded == 0
