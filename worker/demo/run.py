"""`loramill demo`: a queue, a store, the mirror and the worker on this machine, and one mixed batch."""

import asyncio
import importlib.util
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from worker import wire
from worker.demo.base_model import prepare_base_model
from worker.demo.prompts import ADAPTERS, DEMO_PROMPTS, MAX_NEW_TOKENS
from worker.demo.services import MODEL_URI, OUTPUT_URI, Services, read_metric, start
from worker.errors import SettingsError
from worker.jobs import Output
from worker.sender.client import send_job
from worker.sender.follow import wait_for_manifest
from worker.transport.clients import Clients
from worker.transport.store import S3Store

JOB_ID = "demo"
UNKNOWN_ADAPTER = "nobody-uploaded-this"
_SHOWN_CHARACTERS = 120
_JOB_SECONDS = 300


def run_demo(*, keep: bool) -> None:
    """Run the whole of it, show what came out, and end everything that was started.

    Raises SettingsError when the `demo` extra is not installed, LoramillError when something failed.
    """
    missing = [name for name in ("moto", "flask", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError([f"{', '.join(missing)}: not installed; run: pip install 'loramill[demo]'"])
    # A pipe has no width; 80 columns would be too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    with _ended_by_signals(), ExitStack() as stack:
        cache = Path(os.environ.get("LORAMILL_CACHE_DIR") or Path.home() / ".cache" / "loramill")
        with _step(console, "base model SmolLM2-135M-Instruct") as say:
            model = prepare_base_model(cache, say)
        services = start(partial(_step, console), stack, model)
        with _step(console, "one message: rows with different adapters, side by side in one batch"):
            body = _job_body()
            asyncio.run(send_job(services.environ["LORAMILL_QUEUE_URL"], body))
        with _step(console, "results and manifest committed, message deleted", spinner=False):
            manifest = _follow(console, services)
        _show(console, services, body, manifest)
        if keep:
            _keep(console, services)
        else:
            console.print("[dim]loramill demo --keep leaves it running, to send jobs of your own.[/]")


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


def _follow(console: Console, services: Services) -> wire.Manifest:
    """Wait for the manifest, and show meanwhile what the worker's metrics say."""

    async def wait() -> wire.Manifest:
        async with Clients() as clients:
            waiting = asyncio.create_task(
                wait_for_manifest(S3Store(clients), Output(OUTPUT_URI), JOB_ID, _JOB_SECONDS), name="manifest"
            )
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=0.5)
                generated = await asyncio.to_thread(
                    read_metric, services.worker_url, 'loramill_tokens_total{kind="generated"}'
                )
                progress.update(task, completed=generated)
            return waiting.result()

    columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed:.0f} tokens"))
    shown = Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    with shown as progress:
        task = progress.add_task("generating", total=None)
        return asyncio.run(wait())


def _show(console: Console, services: Services, body: str, manifest: wire.Manifest) -> None:
    lines = asyncio.run(_read_lines(manifest))
    by_id = {line["id"]: line for line in lines}
    message = json.loads(body)
    message["inputs"] = [message["inputs"][1], "..."]
    console.rule("the message that went in, one of its rows")
    console.print_json(data=message)
    console.rule(f"two of its {len(lines)} result lines")
    console.print(manifest.outputs[0].uri, highlight=False, soft_wrap=True)
    for line in (lines[1], by_id["mistake"]):
        console.print(json.dumps(line), highlight=False, soft_wrap=True)
    console.rule("the manifest")
    console.print(f"{OUTPUT_URI}{JOB_ID}/manifest.json", highlight=False, soft_wrap=True)
    console.print_json(wire.encode_manifest(manifest).decode())
    console.print(_table(by_id))
    steps = read_metric(services.worker_url, "loramill_batch_rows_count")
    mean_rows = read_metric(services.worker_url, "loramill_batch_rows_sum") / max(1.0, steps)
    mean_adapters = read_metric(services.worker_url, "loramill_batch_adapters_sum") / max(1.0, steps)
    console.print(
        f"{steps:.0f} engine steps held {mean_rows:.1f} rows with {mean_adapters:.1f} adapters on average.\n"
        f"Metrics, while this runs: {services.worker_url}/metrics and {services.sync_url}/metrics",
        soft_wrap=True,
    )


def _table(by_id: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="The same question, another adapter in each column, one batch", show_lines=True)
    table.add_column("question", style="bold", ratio=2, overflow="fold")
    for adapter in ADAPTERS:
        table.add_column(adapter or "base model", ratio=3, overflow="fold")
    for number, prompt in enumerate(DEMO_PROMPTS):
        answers = [by_id[f"{number}/{adapter or 'base'}"]["generated_text"] for adapter in ADAPTERS]
        short = (textwrap.shorten(str(text), _SHOWN_CHARACTERS, placeholder=" …") for text in answers)
        table.add_row(prompt, *short)
    return table


async def _read_lines(manifest: wire.Manifest) -> list[dict[str, Any]]:
    async with Clients() as clients:
        body, _ = await S3Store(clients).get(manifest.outputs[0].uri)
    return [json.loads(line) for line in body.splitlines()]


def _keep(console: Console, services: Services) -> None:
    console.rule("still running; Ctrl-C ends it")
    for name, value in services.environ.items():
        console.print(f"export {name}={value}", soft_wrap=True, highlight=False)
    console.print(
        "\nloramill enqueue --chat 'What is the capital of Norway?' --adapter pirate --wait 60\n"
        f"loramill push DIR {MODEL_URI}adapters/NAME",
        highlight=False,
    )
    console.print(f"logs: {services.folder}/worker.log, {services.folder}/sync.log", highlight=False)
    with suppress(SystemExit):  # Ctrl-C is how this ends
        while True:
            time.sleep(1)


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
def _step(console: Console, title: str, *, spinner: bool = True) -> Iterator[Any]:
    """A line for each step: a spinner while it lasts, its seconds when it is done."""
    started = time.monotonic()
    if console.is_terminal and spinner:
        with console.status(title) as status:
            yield lambda text: status.update(f"{title}: {text}")
    else:
        yield lambda text: console.print(f"  {text}", highlight=False, soft_wrap=True)
    took = f"[dim]({time.monotonic() - started:.1f} s)[/]"
    console.print(f"[green]✓[/] {title} {took}", highlight=False, soft_wrap=True)
