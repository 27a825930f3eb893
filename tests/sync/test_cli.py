"""`sync` and `push` as people run them."""

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
from adapters_sync.layout import resolve, scan
from tests.sync.builders import adapter_files, weights, write_folder

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_serves_its_state_and_ends_cleanly_without_torch(s3_world, tmp_path, number):
    s3_world.bucket.put_adapter("a")
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WITHOUT_TORCH,
                "sync",
                "--adapters-uri",
                s3_world.bucket.uri,
                "--adapters-dir",
                str(s3_world.adapters_dir),
                "--http-port",
                "0",
            ],
            stderr=stderr,
        )
    try:
        lines = wait_for(lambda: [json.loads(line) for line in log.read_text().splitlines()], process)
        port = next(line["port"] for line in lines if line["message"] == "mirroring")
        wait_for(lambda: ask(port, "/ready") == 200, process)
        assert ask(port, "/live") == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b'loramill_sync_adapters{state="ready"} 1.0' in answer.read()
        assert resolve(s3_world.adapters_dir, "a") is not None
        process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert json.loads(log.read_text().splitlines()[-1])["message"] == "stopped"


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
