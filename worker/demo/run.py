"""`loramill demo`: a queue, a store, the mirror and the worker on this machine, and one mixed batch."""

import asyncio
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters_sync.push import push
from worker import wire
from worker.client import wait_for_manifest
from worker.demo.base_model import prepare_base_model
from worker.demo.prompts import ADAPTERS, DEMO_PROMPTS, MAX_NEW_TOKENS
from worker.errors import LoramillError, SettingsError
from worker.jobs import Output
from worker.transport.clients import Clients
from worker.transport.queue import SqsQueue
from worker.transport.store import S3Store

BUCKET, MODEL_PREFIX, JOB_ID = "loramill-demo", "smollm2-135m-instruct", "demo"
MODEL_URI = f"s3://{BUCKET}/{MODEL_PREFIX}/"
OUTPUT_URI = f"s3://{BUCKET}/results/"
UNKNOWN_ADAPTER = "nobody-uploaded-this"
_SHOWN_CHARACTERS = 120
_START_SECONDS, _JOB_SECONDS, _STOP_SECONDS = 180, 300, 15


class Services(NamedTuple):
    """What runs during the demo."""

    environ: dict[str, str]
    """What one has to export to talk to it."""
    worker_url: str
    sync_url: str
    folder: Path
    """Logs, downloads and the mirror; gone at the end."""


def run_demo(*, keep: bool) -> None:
    """Run the whole of it, show what came out, and end everything that was started.

    Raises SettingsError when the `demo` extra is not installed, LoramillError when something failed.
    """
    missing = [name for name in ("moto", "flask", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError([f"{', '.join(missing)}: not installed; run: pip install 'loramill[demo]'"])
    console = Console()
    with _ended_by_signals(), ExitStack() as stack:
        cache = Path(os.environ.get("LORAMILL_CACHE_DIR") or Path.home() / ".cache" / "loramill")
        with _step(console, "base model SmolLM2-135M-Instruct") as say:
            model = prepare_base_model(cache, say)
        services = _start(console, stack, model)
        with _step(console, "one job: rows with different adapters, side by side in one batch"):
            body = _job_body()
            asyncio.run(_enqueue(services.environ["LORAMILL_QUEUE_URL"], body))
        manifest = _follow(console, services)
        _show(console, services, body, manifest)
        if keep:
            _keep(console, services)


def _start(console: Console, stack: ExitStack, model: Path) -> Services:
    """Everything that a real installation has, on loopback addresses."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 (an extra)

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramill-demo-")))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    stack.callback(server.stop)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environ = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LORAMILL_OUTPUT_PREFIXES": OUTPUT_URI,
    }
    stack.enter_context(_environment(environ))
    with _step(console, f"queue, dead-letter queue and bucket on {endpoint} (moto)"):
        environ["LORAMILL_QUEUE_URL"] = asyncio.run(_make_queue_and_bucket())
    with _step(console, f"upload of the model to {MODEL_URI}"):
        asyncio.run(_upload_model(model))
    with _step(console, f"push of {len(ADAPTERS) - 1} adapters to {MODEL_URI}adapters/"):
        asyncio.run(_push_adapters())
    settings = environ | {
        "LORAMILL_MODEL": MODEL_URI,
        "LORAMILL_CACHE_DIR": str(folder / "cache"),
        "LORAMILL_LOG_FORMAT": "text",
    }
    sync_port, worker_port = _free_port(), _free_port()
    sync_only = {"LORAMILL_SYNC_INTERVAL_SECONDS": "2"}
    worker_only = {"LORAMILL_ADAPTER_WAIT_SECONDS": "2"}
    sync = _spawn(stack, "sync", settings | sync_only | {"LORAMILL_HTTP_PORT": str(sync_port)}, folder)
    worker = _spawn(
        stack, "worker", settings | worker_only | {"LORAMILL_HTTP_PORT": str(worker_port)}, folder
    )
    services = Services(environ, f"http://127.0.0.1:{worker_port}", f"http://127.0.0.1:{sync_port}", folder)
    with _step(console, "loramill sync: mirrors the adapters"):
        _until_ready(services.sync_url, sync, folder / "sync.log")
    with _step(console, "loramill worker: downloads and loads the model"):
        _until_ready(services.worker_url, worker, folder / "worker.log")
    return services


async def _make_queue_and_bucket() -> str:
    async with Clients() as clients:
        await clients.objects.create_bucket(Bucket=BUCKET)
        dead = await clients.acks.create_queue(QueueName="loramill-demo-dead")
        found = await clients.acks.get_queue_attributes(
            QueueUrl=dead["QueueUrl"], AttributeNames=["QueueArn"]
        )
        redrive = {"deadLetterTargetArn": found["Attributes"]["QueueArn"], "maxReceiveCount": 5}
        queue = await clients.acks.create_queue(
            QueueName="loramill-demo", Attributes={"RedrivePolicy": json.dumps(redrive)}
        )
        return str(queue["QueueUrl"])


async def _upload_model(model: Path) -> None:
    files = await asyncio.to_thread(lambda: [path for path in sorted(model.iterdir()) if path.is_file()])
    async with Clients() as clients:
        store = S3Store(clients)
        for path in files:
            await store.put(MODEL_URI + path.name, await asyncio.to_thread(path.read_bytes))


async def _push_adapters() -> None:
    for name in filter(None, ADAPTERS):
        await push(Path(__file__).parent / "adapters" / name, f"{MODEL_URI}adapters/")


def _job_body() -> str:
    """A message of chat rows: every prompt with the base and with each adapter, and a mistake."""
    rows = [
        {
            "id": f"{number}/{adapter or 'base'}",
            "messages": [{"role": "user", "content": prompt}],
            "adapter": adapter,
        }
        for number, prompt in enumerate(DEMO_PROMPTS)
        for adapter in ADAPTERS
    ]
    rows.append({"id": "mistake", "input": "Hello", "adapter": UNKNOWN_ADAPTER})
    return wire.encode_job(
        rows, id=JOB_ID, parameters={"max_new_tokens": MAX_NEW_TOKENS}, output=Output(OUTPUT_URI)
    )


async def _enqueue(queue_url: str, body: str) -> None:
    async with Clients() as clients:
        await SqsQueue(clients, queue_url).send(body)


def _follow(console: Console, services: Services) -> wire.Manifest:
    """Wait for the manifest, and show meanwhile what the worker's metrics say."""

    async def wait() -> wire.Manifest:
        async with Clients() as clients:
            waiting = asyncio.create_task(
                wait_for_manifest(S3Store(clients), OUTPUT_URI, JOB_ID, _JOB_SECONDS), name="manifest"
            )
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=0.5)
                generated = await asyncio.to_thread(
                    _metric, services.worker_url, 'loramill_tokens_total{kind="generated"}'
                )
                progress.update(task, completed=generated)
            return waiting.result()

    rows = len(DEMO_PROMPTS) * len(ADAPTERS)
    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed:.0f} tokens"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("generating", total=rows * MAX_NEW_TOKENS)
        return asyncio.run(wait())


def _show(console: Console, services: Services, body: str, manifest: wire.Manifest) -> None:
    lines = asyncio.run(_read_lines(manifest))
    by_id = {line["id"]: line for line in lines}
    table = Table(title="The same question, another adapter in each column, one batch", show_lines=True)
    table.add_column("question", style="bold", ratio=2)
    for adapter in ADAPTERS:
        table.add_column(adapter or "base model", ratio=3)
    for number, prompt in enumerate(DEMO_PROMPTS):
        answers = [by_id[f"{number}/{adapter or 'base'}"]["generated_text"] for adapter in ADAPTERS]
        table.add_row(prompt, *(textwrap.shorten(str(answer), _SHOWN_CHARACTERS) for answer in answers))
    console.print(table)
    message = json.loads(body)
    message["inputs"] = [message["inputs"][1], "..."]
    console.rule("the message that went in (one of its rows)")
    console.print_json(data=message)
    console.rule(f"two of its {len(lines)} result lines: {manifest.outputs[0].uri}")
    console.print_json(data=lines[1])
    console.print_json(data=by_id["mistake"])
    console.rule(f"the manifest: {OUTPUT_URI}{JOB_ID}/manifest.json")
    console.print_json(wire.encode_manifest(manifest).decode())
    steps = _metric(services.worker_url, "loramill_batch_rows_count")
    mean_rows = _metric(services.worker_url, "loramill_batch_rows_sum") / max(1.0, steps)
    mean_adapters = _metric(services.worker_url, "loramill_batch_adapters_sum") / max(1.0, steps)
    console.rule("metrics")
    console.print(
        f"worker {services.worker_url}/metrics, syncer {services.sync_url}/metrics\n"
        f"{steps:.0f} engine steps held {mean_rows:.1f} rows with {mean_adapters:.1f} adapters on average"
    )


async def _read_lines(manifest: wire.Manifest) -> list[dict[str, Any]]:
    async with Clients() as clients:
        body, _ = await S3Store(clients).get(manifest.outputs[0].uri)
    return [json.loads(line) for line in body.splitlines()]


def _keep(console: Console, services: Services) -> None:
    console.rule("still running; Ctrl-C ends it")
    for name, value in services.environ.items():
        console.print(f"export {name}={value}", soft_wrap=True, highlight=False)
    console.print(
        "\nloramill enqueue 'What is the capital of Norway?' --adapter pirate --wait 60\n"
        f"loramill push DIR {MODEL_URI}adapters/NAME",
        highlight=False,
    )
    console.print(f"logs: {services.folder}/worker.log, {services.folder}/sync.log", highlight=False)
    while True:
        time.sleep(1)


def _spawn(
    stack: ExitStack, command: str, settings: dict[str, str], folder: Path
) -> "subprocess.Popen[bytes]":
    """Run `loramill COMMAND` as its users do, with its log in `folder`; stopped at the end."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LORAMILL_", "OPTION_"))} | settings
    log = stack.enter_context((folder / f"{command}.log").open("wb"))
    process = subprocess.Popen(  # noqa: S603 (our own command)
        [sys.executable, "-m", "worker.cli", command], env=environ, stdout=log, stderr=log
    )
    stack.callback(_stop, process)
    return process


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask politely, then again, which means at once, then not at all."""
    for wait_seconds in (1.0, _STOP_SECONDS):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(wait_seconds)
            except subprocess.TimeoutExpired:
                continue
    if process.poll() is None:
        process.kill()
        process.wait()


def _until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LoramillError(f"it ended with code {process.returncode}; its log:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):  # noqa: S310 (our own address)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LoramillError(f"it was not ready after {_START_SECONDS} seconds; its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:  # noqa: S310 (our own address)
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
    return 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables of this process, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C unwind the stack, so that nothing stays behind."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _step(console: Console, title: str) -> Iterator[Any]:
    """A line for each step: a spinner while it lasts, its seconds when it is done."""
    started = time.monotonic()
    if console.is_terminal:
        with console.status(title) as status:
            yield lambda text: status.update(f"{title}: {text}")
    else:
        yield lambda text: console.print(f"  {text}", highlight=False)
    console.print(f"[green]✓[/] {title} [dim]({time.monotonic() - started:.1f} s)[/]", highlight=False)
