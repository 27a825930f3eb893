"""`sync` and `push` as people run them."""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import typer
from typer.testing import CliRunner

from adapters_sync import logs
from adapters_sync.cli import app, build_app
from adapters_sync.event_queue import MAX_POLL_SECONDS
from adapters_sync.layout import resolve, scan
from tests.sync.builders import World, adapter_files, weights, write_folder
from tests.sync.conftest import SERVERS

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from adapters_sync.cli import app; app()"


def test_sync_once_mirrors_and_tells(s3_world, cli):
    s3_world.bucket.put_adapter("a")
    s3_world.bucket.put_adapter("ill", files=adapter_files(r=0))
    result = cli(
        "sync", "--once", "--adapters-uri", s3_world.bucket.uri, "--adapters-dir", s3_world.adapters_dir
    )
    assert result.exit_code == 0, result.output
    assert f"ready    {resolve(s3_world.adapters_dir, 'a').version[:12]}  a" in result.stdout
    assert "invalid  -" in result.stdout
    assert "r is 0" in result.stdout


def test_sync_once_as_json(s3_world, cli, monkeypatch):
    monkeypatch.setenv("LORAMILL_ADAPTERS_DIR", str(s3_world.adapters_dir))
    monkeypatch.setenv("LORAMILL_ADAPTERS_URI", s3_world.bucket.uri)
    s3_world.bucket.put_adapter("a")
    result = cli("sync", "--once", "--json")
    report = json.loads(result.stdout)
    assert report["ok"]
    assert report["adapters"][0]["name"] == "a"


def test_the_prefix_may_come_from_an_s3_model(s3_world, cli, tmp_path):
    s3_world.bucket.put_adapter("a")
    model = s3_world.bucket.uri.removesuffix("adapters/")
    assert cli("sync", "--once", "--model", model, "--cache-dir", tmp_path / "cache").exit_code == 0
    (link,) = (tmp_path / "cache").glob("**/adapters/a")
    assert [one.name for one in scan(link.parent)] == ["a"]


def test_a_failed_listing_is_one_line_and_exit_code_1(s3_world, cli, tmp_path):
    result = cli(
        "sync",
        "--once",
        "--adapters-uri",
        "s3://no-such-bucket/m/adapters/",
        "--adapters-dir",
        tmp_path / "x",
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("loramill: cannot list s3://no-such-bucket/m/adapters/")


def test_misuse_names_every_mistake_and_is_exit_code_2(cli, monkeypatch):
    monkeypatch.setenv("LORAMILL_SYNC_INTERVAL_SECOND", "3")
    result = cli("sync", "--http-port", "70000", "--settle-seconds", "soon")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("loramill: ") for line in lines)


@pytest.mark.parametrize(
    "args",
    [
        ("sync",),
        ("sync", "--nonsense"),
        ("push", "nowhere", "s3://bucket/m/adapters/"),
        ("push", ".", "s3://bucket/m/"),
        ("push",),
    ],
)
def test_misuse_is_exit_code_2(cli, args):
    assert cli(*args).exit_code == 2


def test_a_parent_may_mount_the_commands_and_allow_its_own_variables(cli, monkeypatch):
    parent = typer.Typer()
    parent.command("other")(lambda: None)
    parent.add_typer(build_app(known={"LORAMILL_QUEUE_URL"}))
    monkeypatch.setenv("LORAMILL_QUEUE_URL", "x")
    result = cli("sync", app=parent)
    assert "nothing to mirror" in result.stderr
    assert "QUEUE_URL" not in result.stderr
    assert "QUEUE_URL" in cli("sync").stderr


def test_push_prints_address_and_version(s3_world, cli, tmp_path):
    folder = write_folder(tmp_path / "sql", adapter_files() | {"optimizer.pt": b"x"})
    result = cli("push", folder, s3_world.bucket.uri)
    assert result.exit_code == 0, result.output
    s3_world.sync()
    version = resolve(s3_world.adapters_dir, "sql").version
    assert result.stdout == f"{s3_world.bucket.uri}sql/ version {version}\n"
    assert "left out optimizer.pt: a pickle" in result.stderr
    assert "uploaded adapter_model.safetensors (" in result.stderr
    assert json.loads(cli("push", folder, s3_world.bucket.uri, "--json").stdout)["version"] == version


def test_push_of_a_bad_adapter_is_one_line_and_exit_code_1(cli, tmp_path):
    folder = write_folder(
        tmp_path / "sql", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights()}
    )
    result = cli("push", folder, "s3://bucket/m/adapters/")
    assert result.exit_code == 1
    assert result.stderr == "loramill: adapter_config.json: peft_type is missing; only LORA is served\n"
    with pytest.raises(Exception, match="peft_type"):
        CliRunner().invoke(
            app, ["push", str(folder), "s3://bucket/m/adapters/", "--debug"], catch_exceptions=False
        )


@contextlib.contextmanager
def service(world, log, *arguments):
    """`loramill sync` as a process, ready; it and its port. It is killed at the end, if it lives still."""
    where = [
        "--adapters-uri",
        world.bucket.uri,
        "--adapters-dir",
        str(world.adapters_dir),
        "--http-port",
        "0",
    ]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_TORCH, "sync", *where, *arguments], stderr=stderr
        )
    try:
        port = wait_for(lambda: next((one["port"] for one in said(log) if "port" in one), None), process)
        wait_for(lambda: ask(port, "/ready") == 200, process)
        yield process, port
    finally:
        process.kill()
        process.wait()


def said(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def metrics(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return answer.read().decode()


@pytest.mark.parametrize(("server", "number"), [(SERVERS[0], signal.SIGTERM), (SERVERS[-1], signal.SIGINT)])
def test_the_service_serves_its_state_and_ends_cleanly_without_torch(make_bucket, tmp_path, server, number):
    world, log = World(make_bucket(server), tmp_path), tmp_path / "log"
    world.bucket.put_adapter("a")
    with service(world, log) as (process, port):
        assert ask(port, "/live") == 200
        assert 'loramill_sync_adapters{state="ready"} 1.0' in metrics(port)
        assert resolve(world.adapters_dir, "a") is not None
        process.send_signal(number)
        assert process.wait(20) == 0
    assert said(log)[-1]["message"] == "stopped"


def test_the_service_serves_an_upload_that_it_hears_of_and_ends_in_the_middle_of_a_poll(
    make_bucket, event_queue, tmp_path
):
    world, log = World(make_bucket("moto"), tmp_path), tmp_path / "log"
    event_queue.hear_of(world.bucket)
    event_queue.send("garbage")
    told = ["--adapters-events-queue-url", event_queue.url, "--sync-interval-seconds", "3600"]
    with service(world, log, *told) as (process, port):
        world.bucket.put_adapter("a")
        wait_for(lambda: resolve(world.adapters_dir, "a"), process)
        wait_for(lambda: 'loramill_sync_events_total{outcome="unreadable"} 1.0' in metrics(port), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(MAX_POLL_SECONDS / 2) == 0
    messages = [line["message"] for line in said(log)]
    assert "listening for S3 events" in messages
    assert messages[-1] == "stopped"


@pytest.mark.parametrize("url", ["jobs", "s3://bucket/queue", "https://sqs.eu-central-1.amazonaws.com"])
def test_a_queue_of_events_that_is_none_is_misuse(cli, url):
    result = cli("sync", "--adapters-uri", "s3://bucket/m/adapters/", "--adapters-events-queue-url", url)
    assert result.exit_code == 2
    assert result.stderr == (
        f"loramill: adapters_events_queue_url: '{url}' (from --adapters-events-queue-url) must be "
        "the http(s) URL of a queue\n"
    )


def test_the_jobs_of_a_worker_are_not_taken_for_events(cli, monkeypatch):
    url = "https://sqs.eu-central-1.amazonaws.com/123456789012/jobs"
    monkeypatch.setenv("LORAMILL_QUEUE_URL", url)
    monkeypatch.setenv("LORAMILL_ADAPTERS_EVENTS_QUEUE_URL", url)
    app = build_app(known={"LORAMILL_QUEUE_URL"})
    result = cli("sync", "--adapters-uri", "s3://bucket/m/adapters/", app=app)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"loramill: adapters_events_queue_url: '{url}' must not be ")


def test_a_single_sync_needs_no_queue_of_events(make_bucket, tmp_path, cli, monkeypatch):
    world = World(make_bucket("moto"), tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "nonsense")
    told = "--adapters-uri", world.bucket.uri, "--adapters-dir", world.adapters_dir
    told += "--adapters-events-queue-url", "https://host/1/events"
    assert cli("sync", "--once", *told).exit_code == 0
    assert cli("sync", *told).exit_code == 2


def ask(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def wait_for(condition, process, seconds=30):
    """Poll a process of its own; there is no clock to inject into it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_log_lines_are_a_sentence_and_fields():
    record = logging.makeLogRecord(
        {
            "msg": "published an adapter",
            "levelno": 20,
            "levelname": "INFO",
            "name": "n",
            "created": 0.0,
            "msecs": 7.0,
            "adapter": "a",
        }
    )
    assert (
        logs.TextFormatter().format(record) == "1970-01-01T00:00:00.007Z INFO published an adapter adapter=a"
    )
    line = json.loads(logs.JsonFormatter().format(record))
    assert line == {
        "time": "1970-01-01T00:00:00.007Z",
        "level": "info",
        "logger": "n",
        "message": "published an adapter",
        "adapter": "a",
    }
