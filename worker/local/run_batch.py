"""`loramill run-batch`: the worker's engine on a file of this machine, without queue and store."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adapters_sync.layout import resolve
from worker import wire
from worker.custom.opening import find_entry_point
from worker.delivery.commit import provenance
from worker.errors import InvalidMessage, JobError, LoramillError, SettingsError
from worker.jobs import Delivery, Job, Output, Part, RowResult, Source
from worker.local.input import LocalInput, open_input
from worker.local.output import LocalOutput, Run, open_output
from worker.local.progress import say, showing, showing_rows
from worker.local.signals import Interrupted, Interruptible
from worker.model_source import local_weights
from worker.settings import Settings
from worker.wire.lines import read_line
from worker.wire.manifest import Manifest, OutputFile, summarize
from worker.wire.output import LineWriter
from worker.wire.results import Tally
from worker.wire.split import InputFile

if TYPE_CHECKING:
    from worker.core import Core  # torch

_ANYWHERE = "s3://any/"
_SYNC_SECONDS = 5.0
_TELLING = ("model", "model_id", "dtype", "lora_dtype", "max_model_len")
"""Settings that lines follow from."""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is told beside the settings."""

    source: str
    """A file of rows; "-" is standard input."""
    target: Path
    adapter: str | None = None
    """For rows that name none."""
    parameters: Mapping[str, Any] = {}
    """For native rows that do not say otherwise."""
    task: str | None = None
    input_format: str = "auto"
    format: str = "native"
    """Of the lines."""
    overwrite: bool = False
    restart: bool = False


def run_batch(settings: Settings, batch: Batch) -> Manifest:
    """Run the rows of a file that have no line yet; the lines are the target then, this its manifest.

    Blocking, from the main thread. Raises LoramillError, and SystemExit for SIGINT and SIGTERM: the lines so
    far are kept.
    """
    _check(settings, batch)
    said = _as_sent(batch)
    try:
        with (
            Interruptible() as interruptible,
            open_output(batch.target, overwrite=batch.overwrite) as output,
            open_input(batch.source) as source,
        ):
            if source.is_at(output.target):
                raise InvalidMessage(f"--output {batch.target}: it is the input")
            run = output.begin(_asked(settings, batch, source), batch.format, restart=batch.restart)
            rows, offset = interruptible.run(source.measure(output.rows))
            if not rows:
                raise InvalidMessage(f"--input {batch.source}: it has no rows")
            job = _located(said, source, output, run, rows=rows, offset=offset)
            try:
                return _see_through(interruptible, settings, job, source, output)
            except (LoramillError, Interrupted) as exc:
                if not isinstance(exc, JobError):
                    same = "the same command" + (" without --restart" if batch.restart else "")
                    say(f"stopped: {output.rows} of {rows} rows are done; {same} goes on")
                raise
    except Interrupted as told:
        raise SystemExit(128 + told.number) from None


def _check(settings: Settings, batch: Batch) -> None:
    """Raise SettingsError for what only a worker can do, or what nobody can."""
    mistakes, folder = [], settings.adapters_path
    mistakes += [
        f"{name}: {place} is in S3, where run-batch does not look; give a local folder or a hub id"
        for name, place in (("model", settings.model), ("model_id", settings.model_id))
        if place is not None and place.startswith("s3://")
    ]
    if settings.adapters_dir is not None and not settings.adapters_dir.is_dir():
        mistakes.append(f"--adapters: {settings.adapters_dir} is not a folder")
    elif batch.adapter and not settings.lora_enabled:
        mistakes.append(f"--adapter {batch.adapter}: no adapters are served; give --adapters")
    elif batch.adapter and folder is not None and resolve(folder, batch.adapter) is None:
        mistakes.append(f"--adapter {batch.adapter}: there is no such adapter in {folder}")
    if not mistakes and find_entry_point(settings, settings.model_dir) is not None:
        mistakes.append("custom_code: run-batch has only the engine, and this model's handler would answer")
    if mistakes:
        raise SettingsError(mistakes)


def _as_sent(batch: Batch) -> Job:
    """What a worker would make of the same job, sent as a message. Raises InvalidMessage."""
    body = wire.encode_job(
        id="-",
        input={"uri": f"{_ANYWHERE}rows", "format": batch.input_format},
        adapters=batch.adapter,
        parameters=batch.parameters or None,
        task=batch.task,
        output=Output(_ANYWHERE, batch.format),
    )
    delivery = Delivery(message_id="-", body=body, receipt="-")
    job = wire.decode(delivery, output_prefixes=[_ANYWHERE], max_rows=1, now=time.time())
    row = read_line(b'"any"', 0, job.given)
    if row.failure is not None:
        raise InvalidMessage(row.failure.message)
    return job


def _asked(settings: Settings, batch: Batch, source: LocalInput) -> dict[str, Any]:
    """What the lines follow from."""
    with showing(f"reading {source.uri}"):
        sha256 = source.sha256
    return {
        "sha256 of the input": sha256,
        "adapter": batch.adapter or None,
        "parameters": dict(batch.parameters),
        "task": batch.task or "generate",
        "input_format": batch.input_format,
        "format": batch.format,
        **{name: getattr(settings, name) for name in _TELLING},
        **({"custom_code": True} if settings.custom_code else {}),
    }


def _located(said: Job, source: LocalInput, output: LocalOutput, run: Run, *, rows: int, offset: int) -> Job:
    """The rows that have no line yet, as a part of the job."""
    assert said.source is not None
    return msgspec.structs.replace(
        said,
        # Seeds follow from the id: a second run says the same, wherever the first was stopped.
        id=f"batch-{run.digest[:32]}",
        digest=run.digest,
        created_at=run.created_at,
        output=Output(str(output.target), said.output.format),
        source=Source(uri=source.uri, etag=source.etag, format=said.source.format, start=offset),
        part=Part(first_row=output.rows, rows=rows - output.rows),
    )


def _see_through(
    interruptible: Interruptible, settings: Settings, job: Job, source: LocalInput, output: LocalOutput
) -> Manifest:
    if job.num_rows:
        _compute(interruptible, settings, job, source, output)

    def summary(file: OutputFile, tally: Tally) -> Manifest:
        return summarize(
            job,
            [(file, tally)],
            started_at=job.created_at,
            finished_at=time.time(),
            input_file=InputFile(source.uri, source.sha256),
            **msgspec.structs.asdict(provenance(settings)),
        )

    return output.finish(summary)


def _compute(
    interruptible: Interruptible, settings: Settings, job: Job, source: LocalInput, output: LocalOutput
) -> None:
    """Add the lines that are missing."""
    weights = local_weights(settings)
    with showing(f"loading {weights}"):
        from worker.core import build_core  # noqa: PLC0415 (torch)

        core = build_core(settings, weights)
    with closing(core):
        _run(interruptible, settings, job, source, output, core=core)


def _run(
    interruptible: Interruptible,
    settings: Settings,
    job: Job,
    source: LocalInput,
    output: LocalOutput,
    *,
    core: "Core",
) -> None:
    from worker.local.rows import run_rows  # noqa: PLC0415 (torch)

    writer, synced = LineWriter(job, base_model=str(settings.model)), time.monotonic()
    total = output.rows + job.num_rows
    with showing_rows(output.rows, total) as tell:

        async def emit(result: RowResult) -> None:
            nonlocal synced
            output.add(writer.line(result))
            if time.monotonic() - synced >= _SYNC_SECONDS:
                await asyncio.to_thread(output.sync)
                synced = time.monotonic()

        def on_left(rows: int) -> None:
            tell(total - rows)

        interruptible.run(run_rows(core, settings, job, source, emit=emit, on_left=on_left))
