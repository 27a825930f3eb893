"""The command line: exit codes, readable mistakes, and what is imported for what."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from worker.cli import _open_many_files, app
from worker.sender import client
from worker.transport.memory import MemoryStore

QUEUE = "http://127.0.0.1:1/queue"
OUT = "s3://bucket/out/"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, with no settings but the given ones."""
    for name in [name for name in os.environ if name.startswith(("LORAMILL_", "OPTION_"))]:
        monkeypatch.delenv(name)

    def run(*arguments: Any, stdin: bytes | None = None, **environ: str) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env=environ)

    return run


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was put on which queue."""
    found: list[tuple[str, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, queue_url: str) -> None:
            self.url = queue_url

        async def send(self, body: str, *, group_id: str | None = None) -> None:
            found.append((self.url, json.loads(body)))

    @asynccontextmanager
    async def services(queue_url: str) -> AsyncIterator[Any]:
        yield MemoryStore(), Recorder(queue_url)

    monkeypatch.setattr(client, "_services", services)
    return found


def assert_misuse(result: Result, *lines: str) -> None:
    """Exit code 2 and, on stderr, these lines alone; each line is given as a beginning."""
    assert result.exit_code == 2, result.output
    said = result.stderr.splitlines()
    assert [f"loramill: {line}" for line in lines] == [
        one[: len(f"loramill: {line}")] for one, line in zip(said, lines, strict=True)
    ], said
    assert result.stdout == ""


def test_no_command_shows_the_help(cli):
    result = cli()
    assert result.exit_code == 2
    assert "Usage" in result.output


@pytest.mark.parametrize(
    "command",
    [
        "worker",
        "sync",
        "push",
        "enqueue",
        "results",
        "status",
        "cancel",
        "redrive",
        "doctor",
        "run-batch",
        "demo",
    ],
)
def test_every_command_explains_itself(cli, command):
    result = cli(command, "--help", COLUMNS="200")
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    assert command in cli("--help").stdout


def test_every_setting_is_a_flag_of_the_worker(cli):
    from adapters_sync.settings import describe
    from worker.settings import Settings

    text = cli("worker", "--help", COLUMNS="250").stdout
    assert [info.flag for info in describe(Settings) if info.flag not in text] == []


def test_unknown_option_and_unknown_command_are_misuse(cli):
    for arguments in (["worker", "--no-such"], ["nonsense"], ["push"], ["demo", "too", "much"]):
        result = cli(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


def test_a_bad_setting_is_named_with_its_value_and_its_limit(cli):
    result = cli("worker", "--max-num-seqs", "0", LORAMILL_QUEUE_URL="https://host/1/jobs")
    assert_misuse(
        result,
        "model: required",
        "output_prefixes: required",
        "max_num_seqs: '0' (from --max-num-seqs) must be at least 1",
    )


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (("/a/one", "/b/two"), "they name the models /a/one and /b/two, and a worker has one; give --model"),
        ((), "{0}: models is empty; it must name one model at least"),
    ],
)
def test_workflows_of_several_models_or_none_leave_the_model_open(cli, tmp_path, models, says):
    body = {"name": "w", "models": {f"m{n}": one for n, one in enumerate(models)}, "workflow": {}}
    body["workflow"] = {"out": ["m0", "in"]}
    (tmp_path / "workflow.json").write_text(json.dumps(body))
    assert_misuse(cli("worker", "--workflows", str(tmp_path)), "workflows: " + says.format(tmp_path))


def test_every_mistake_is_told_at_once(cli):
    result = cli(
        "worker",
        "--max-loras",
        "many",
        LORAMILL_QUEUE_URL="not a url",
        LORAMILL_OUTPUT_PREFIXES="s3://no-slash",
        LORAMILL_MAX_LORA="4",
        OPTION_NONSENSE="1",
    )
    assert result.exit_code == 2
    said = result.stderr
    for name in ("max_loras", "queue_url", "output_prefixes", "LORAMILL_MAX_LORA", "OPTION_NONSENSE"):
        assert sum(line.startswith(f"loramill: {name}:") for line in said.splitlines()) == 1, said
    assert "the nearest known one is LORAMILL_MAX_LORAS" in said


def test_what_is_missing_is_told_with_what_is_wrong(cli):
    result = cli("worker", "--max-loras", "0", LORAMILL_QUEUE_URL="not a url")
    assert result.exit_code == 2
    told = {line.split(":")[1].strip() for line in result.stderr.splitlines()}
    assert told == {"max_loras", "model", "queue_url", "output_prefixes"}


def test_worker_says_which_required_settings_are_missing(cli):
    model = "model: required, and not set; set LORAMILL_MODEL or --model"
    queue = "queue_url: required, and not set; set LORAMILL_QUEUE_URL or --queue-url"
    output = "output_prefixes: required, and not set; set LORAMILL_OUTPUT_PREFIXES or --output-prefixes"
    assert_misuse(cli("worker", "--output-prefixes", "s3://bucket/out/"), model, queue)
    assert_misuse(cli("worker", "--queue-url", "https://host/1/jobs"), model, output)
    assert_misuse(cli("worker"), model)


def test_a_secret_is_not_shown_among_the_mistakes(cli):
    result = cli("worker", "--http-token", "s3cret", "--max-loras", "0", LORAMILL_HTTP_HOST="0.0.0.0")
    assert result.exit_code == 2
    assert "s3cret" not in result.output


def test_mistakes_in_serving_properties_count_too(cli, tmp_path):
    (tmp_path / "serving.properties").write_text("option.max_loras=0\noption.nonsense=1\n")
    result = cli("worker", "--model", tmp_path, "--queue-url", QUEUE, "--output-prefixes", OUT)
    assert result.exit_code == 2
    assert "option.max_loras in serving.properties" in result.stderr
    assert "option.nonsense: unknown key" in result.stderr


def test_enqueue_takes_prompts_as_arguments(cli, sent):
    result = cli("enqueue", "one", "two", "--queue-url", QUEUE, "--id", "j", "-a", "red", "-p", "seed=7")
    assert (result.exit_code, result.stdout) == (0, "j\n")
    ((url, body),) = sent
    assert url == QUEUE
    assert body["inputs"] == ["one", "two"]
    assert (body["id"], body["adapters"], body["parameters"]) == ("j", "red", {"seed": 7})
    assert "output" not in body


def test_enqueue_gives_every_job_a_new_id(cli, sent):
    ids = {cli("enqueue", "x", "--queue-url", QUEUE).stdout.strip() for _ in range(3)}
    assert ids == {body["id"] for _, body in sent}
    assert len(ids) == 3


def test_enqueue_takes_an_adapter_for_each_row(cli, sent):
    assert cli("enqueue", "a", "b", "-a", "red", "-a", "", "--queue-url", QUEUE).exit_code == 0
    assert sent[0][1]["adapters"] == ["red", ""]


def test_enqueue_sends_results_to_the_first_output_prefix_or_where_it_is_told(cli, sent):
    prefixes = {"LORAMILL_OUTPUT_PREFIXES": f"{OUT},s3://other/"}
    cli("enqueue", "x", "--queue-url", QUEUE, **prefixes)
    cli("enqueue", "x", "--queue-url", QUEUE, "--output", "s3://other/there", **prefixes)
    assert [body["output"]["uri"] for _, body in sent] == [OUT, "s3://other/there"]


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_enqueue_takes_rows_from_json_lines(cli, sent, tmp_path, source):
    lines = (
        '{"input": "ä", "adapter": "red"}\n\n"just text"\r\n{"messages": [{"role": "user", "content": "x"}]}'
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(lines, encoding="utf-8")
    name = file if source == "file" else "-"
    result = cli("enqueue", "--file", name, "--queue-url", QUEUE, stdin=lines.encode())
    assert result.exit_code == 0, result.output
    ((_, body),) = sent
    assert body["inputs"] == [
        {"input": "ä", "adapter": "red"},
        "just text",
        {"messages": [{"role": "user", "content": "x"}]},
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give either prompts or --file"),
        (["x", "--file", "-"], "give either prompts or --file"),
        (["--file", "/no/such"], "--file /no/such: No such file or directory"),
        (["--file", "-"], "--file -, line 2: Input data was truncated"),
        (["x", "-p", "seed"], "--parameter 'seed' is not of the form NAME=JSON"),
        (["x", "-p", "seed=seven"], "--parameter seed: 'seven' is not JSON"),
        (["x", "-p", "seed=-1"], "row 0: parameter seed is -1; it must be a whole number from 0"),
        (["x", "-p", "sead=1"], "row 0: parameter 'sead' is unknown; the nearest known one is seed"),
        (["x", "-p", "seed=\udcff"], "--parameter seed: "),
        (["x", "--id", "a/b"], "id is 'a/b'; it must be"),
        (["x", "y", "z", "-a", "1", "-a", "2"], "Number of adapters is not equal to the number of inputs"),
        (["x", "--output", "there"], "output.uri is 'there"),
        (["\udcff"], "the job cannot be written as JSON"),
        (["x" * 1_100_000], "the message would have"),
        (
            ["--file", "s3://b/k", "-a", "x", "-a", "y"],
            "--adapter: for a file that is too large for a message",
        ),
        (["--file", "s3://b/k"], "--file s3://b/k does not exist"),
        (["--file", "s3://b/k/"], "--file s3://b/k/: nothing below it ends in .jsonl or .jsonl.gz"),
        (["--file", "s3://b/k/", "--wait", "1", "--output", OUT], "--wait: s3://b/k/ is several jobs"),
        (["x", "--wait", "1"], "--wait: say where the results go"),
    ],
)
def test_enqueue_refuses_what_a_worker_would(cli, sent, arguments, line):
    result = cli("enqueue", *arguments, "--queue-url", QUEUE, stdin=b'"fine"\n{"input": \n')
    assert_misuse(result, line)
    assert sent == []


def test_enqueue_refuses_a_file_that_is_not_utf_8_or_empty(cli, sent, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'"\xff"\n')
    assert_misuse(cli("enqueue", "--file", file, "--queue-url", QUEUE), f"--file {file}, line 1: ")
    file.write_bytes(b"\n\n")
    assert_misuse(cli("enqueue", "--file", file, "--queue-url", QUEUE), "inputs has 0 rows")


def test_enqueue_needs_a_queue(cli):
    assert_misuse(cli("enqueue", "x"), "queue_url: required, and not set")


def test_a_queue_that_cannot_be_reached_is_exit_code_1_and_one_line(cli, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    result = cli("enqueue", "x", "--queue-url", QUEUE)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("loramill: ")


def test_debug_shows_the_traceback(cli):
    result = cli("worker", "--max-loras", "0", "--debug")
    assert result.exception is not None
    assert type(result.exception).__name__ == "SettingsError"


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LORAMILL_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["sync", "push", "enqueue", "worker"])
def test_help_needs_no_torch(command):
    code = "import sys; sys.modules['torch'] = None; from worker.cli import main; main()"
    done = _python(code, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_importing_the_command_imports_no_torch():
    code = "import sys, worker.cli; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = _python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("environ", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_worker_does_not_let_threads_spin_for_long_unless_told_to(cli, monkeypatch, environ, spins):
    from worker import app as worker_app

    async def run_worker(*_: Any, **__: Any) -> None:
        assert os.environ.get("GOMP_SPINCOUNT") == spins

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(worker_app, "run_worker", run_worker)
    given = ["--model", "nobody/nothing", "--queue-url", QUEUE, "--output-prefixes", OUT]
    result = cli("worker", *given, **environ)
    assert result.exit_code == 0, result.output


def test_worker_takes_the_open_files_that_it_is_granted():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        _open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("command", ["results", "status", "cancel"])
@pytest.mark.parametrize("job_id", ["", "..", "../../x", "a b", "x" * 129])
def test_what_is_no_job_id_is_misuse(cli, command, job_id):
    result = cli(command, "--output", OUT, "--", job_id)
    assert_misuse(result, f"JOB is {job_id!r}; it must be")


def test_task_and_format_are_in_the_message(cli, sent):
    given = ["--queue-url", QUEUE, "--output", OUT, "--id", "j"]
    rows = b'{"input": "Bees make", "target": " honey"}'
    assert cli("enqueue", *given, "--file", "-", "--task", "score", stdin=rows).exit_code == 0
    assert cli("enqueue", *given, "hello", "--format", "openai").exit_code == 0
    (_, score), (_, openai) = sent
    assert score["task"] == "score"
    assert openai["output"] == {"uri": OUT, "format": "openai"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--task", "guess"], "task is 'guess'"),
        (["--format", "csv", "--output", OUT], "output.format is 'csv'"),
        (["--format", "openai"], "--format: say where the results go"),
    ],
)
def test_task_and_format_that_no_worker_knows_are_misuse(cli, arguments, line):
    result = cli("enqueue", "--queue-url", QUEUE, "hello", *arguments)
    assert result.exit_code == 2
    assert line in result.stderr
