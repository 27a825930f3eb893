"""The files in docker/: no engine runs here, so what can be held to the code is held to it."""

import http.server
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SYNC_NEEDS = {"aioboto3", "aiohttp", "javaproperties", "msgspec", "prometheus-client", "rich", "typer"}
TOKEN = "0123456789abcdef"

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """compose.yaml with the host's variables filled in, as `docker compose config` would."""
    text = (DOCKER / "compose.yaml").read_text()
    text = text.replace("${LORAMILL_HTTP_TOKEN:?set it to a secret of your own}", TOKEN)
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "${" not in text
    return yaml.safe_load(text)


def instructions(dockerfile: Path) -> list[str]:
    """The instructions of a Dockerfile, one a line, without comments."""
    kept = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(kept))
    return [line for line in joined.splitlines() if line]


def healthcheck(dockerfile: Path) -> list[str]:
    (line,) = (one for one in instructions(dockerfile) if one.startswith("HEALTHCHECK"))
    return json.loads(line.partition(" CMD ")[2])


def run_healthcheck(dockerfile: Path, **environment: str) -> int:
    _python, *arguments = healthcheck(dockerfile)
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, check=False, cwd=ROOT
    )
    return done.returncode


def test_syncer_installs_its_part_of_the_dependencies_with_their_bounds(pyproject):
    (line,) = (one for one in instructions(DOCKER / "sync.Dockerfile") if '"aioboto3' in one)
    wanted = {
        dependency
        for dependency in pyproject["project"]["dependencies"]
        if re.split(r"[<>=!~\[;]", dependency)[0] in SYNC_NEEDS
    }
    assert len(wanted) == len(SYNC_NEEDS)
    assert set(re.findall(r'"([^"]+)"', line)) == wanted


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "safetensors"])
def test_syncer_has_no_model_libraries(name):
    assert name not in "\n".join(instructions(DOCKER / "sync.Dockerfile"))


def test_syncer_needs_no_more_than_its_image_has():
    """The mirror's modules import in a process where the rest of the dependencies are missing."""
    names = [
        "adapters_sync",
        *(f"adapters_sync.{path.stem}" for path in (ROOT / "adapters_sync").glob("*.py")),
    ]
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'transformers', 'peft', 'safetensors'): sys.modules[name] = None\n"
        f"for name in {[name for name in names if not name.endswith('__')]}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_do_not_run_as_root(dockerfile):
    users = [one.split()[1] for one in instructions(dockerfile) if one.startswith("USER")]
    assert users == ["10001"]


@pytest.mark.parametrize(("name", "command"), [("worker", "worker"), ("sync", "sync")])
def test_images_start_the_command_of_their_name(name, command, pyproject):
    lines = instructions(DOCKER / f"{name}.Dockerfile")
    (script,) = pyproject["project"]["scripts"]
    assert f'ENTRYPOINT ["{script}"]' in lines
    assert f'CMD ["{command}"]' in lines


def test_build_context_has_what_the_build_reads(pyproject):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    project = pyproject["project"]
    packages = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for path in (
        *packages,
        *project["license-files"],
        project["readme"],
        "pyproject.toml",
        "docker/local-aws.py",
    ):
        assert f"!{path}" in lines
        assert (ROOT / path).exists()
    assert lines.index("*") < min(number for number, line in enumerate(lines) if line.startswith("!"))


@pytest.mark.parametrize(("name", "path"), [("worker", "/live"), ("sync", "/ready")])
def test_images_are_healthy_while_their_path_answers(name, path):
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            asked.append(self.path)

        def log_message(self, *_arguments):
            pass

    status, asked = 200, []
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = str(server.server_port)
        try:
            assert run_healthcheck(DOCKER / f"{name}.Dockerfile", LORAMILL_HTTP_PORT=port) == 0
            status = 503
            assert run_healthcheck(DOCKER / f"{name}.Dockerfile", LORAMILL_HTTP_PORT=port) != 0
        finally:
            server.shutdown()
            thread.join()
    assert run_healthcheck(DOCKER / f"{name}.Dockerfile", LORAMILL_HTTP_PORT=port) != 0
    assert asked == [path, path]


def test_compose_is_reachable_from_this_host_alone(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_has_no_default_token():
    text = (DOCKER / "compose.yaml").read_text()
    assert re.findall(r"LORAMILL_HTTP_TOKEN: (.*)", text) == [
        "${LORAMILL_HTTP_TOKEN:?set it to a secret of your own}"
    ]


def test_every_lasting_service_has_a_healthcheck(compose):
    for service in compose["services"].values():
        if service["restart"] != "no":
            dockerfile = ROOT / service["build"]["dockerfile"]
            in_image = any(one.startswith("HEALTHCHECK") for one in instructions(dockerfile))
            assert in_image != ("healthcheck" in service)


def test_services_wait_for_what_they_need(compose):
    services = compose["services"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            lasting = services[needed]["restart"] != "no"
            expected = "service_healthy" if lasting else "service_completed_successfully"
            assert how == {"condition": expected}


def test_only_the_syncer_writes_adapters(compose):
    mounts = {name: service.get("volumes", []) for name, service in compose["services"].items()}
    assert [name for name, found in mounts.items() if any(one.startswith("adapters:") for one in found)] == [
        "syncer",
        "worker",
    ]
    assert "adapters:/srv/loramill" in mounts["syncer"]
    assert "adapters:/srv/loramill:ro" in mounts["worker"]
    assert {mount.partition(":")[0] for found in mounts.values() for mount in found} == set(
        compose["volumes"]
    )


def test_worker_has_longer_to_stop_than_it_drains(compose):
    settings = pytest.importorskip("worker.settings")
    grace_seconds = int(compose["services"]["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > settings.Settings().drain_timeout_seconds


def test_environment_names_are_settings():
    settings = pytest.importorskip("worker.settings")
    text = "\n".join(path.read_text() for path in DOCKER.iterdir())
    names = set(re.findall(r"\bLORAMILL_[A-Z_]*[A-Z]\b", text))
    assert names
    assert names <= set(settings.KNOWN_NAMES)


@pytest.mark.parametrize("service", ["worker", "syncer"])
def test_settings_accept_the_environment_of_compose(compose, service):
    settings = pytest.importorskip("worker.settings")
    read = settings.read_settings(environ=compose["services"][service]["environment"])
    assert read.mirror_uri == "s3://loramill/smollm2/adapters/"
    assert read.adapters_path == Path("/srv/loramill/smollm2/adapters")


def test_local_aws_creates_the_bucket_and_the_queues_twice(monkeypatch):
    moto = pytest.importorskip("moto")
    import botocore.session

    for name, value in {
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "x",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("BUCKET", "jobs-bucket")
    monkeypatch.setenv("QUEUE", "jobs")
    main = runpy.run_path(str(DOCKER / "local-aws.py"))["main"]
    with moto.mock_aws():
        main("create")
        main("create")
        session = botocore.session.get_session()
        assert [found["Name"] for found in session.create_client("s3").list_buckets()["Buckets"]] == [
            "jobs-bucket"
        ]
        sqs = session.create_client("sqs")
        url = sqs.get_queue_url(QueueName="jobs")["QueueUrl"]
        attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert json.loads(attributes["RedrivePolicy"])["deadLetterTargetArn"].endswith(":jobs-dead-letters")


def test_local_aws_checks_for_any_answer_at_all(tmp_path):
    main = runpy.run_path(str(DOCKER / "local-aws.py"))["main"]
    with pytest.raises(SystemExit, match=r"127\.0\.0\.1:9/"):
        main("check", "http://127.0.0.1:9/")
