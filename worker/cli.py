"""The `loramill` command. Heavy imports wait until a command needs them."""

import asyncio
import os
import resource
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from adapters_sync import cli as sync_cli
from adapters_sync import logs
from adapters_sync.errors import SyncError
from adapters_sync.settings import describe
from worker.errors import InvalidMessage, LoramillError, SettingsError
from worker.jobs import Output
from worker.model_source import local_properties
from worker.options import with_settings
from worker.sender.files import LocalFile, find_files, from_stdin, read_file
from worker.settings import KNOWN_NAMES, Settings, read_settings
from worker.wire.native import is_job_id

FAILED, MISUSED = 1, 2

app = typer.Typer(
    name="loramill",
    help="Batch inference for LLMs with many LoRA adapters on one base model: SQS in, S3 out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
_OutputOption = Annotated[
    str | None,
    typer.Option("--output", metavar="URI", help="The job's output. Default: the first of OUTPUT_PREFIXES."),
]
_INFOS = describe(Settings)
_QUEUE = [info for info in _INFOS if info.name == "queue_url"]
_OUTPUT = [info for info in _INFOS if info.name == "output_prefixes"]
_ENQUEUE = [info for info in _INFOS if info.name in {"queue_url", "output_prefixes"}]


@app.command()
@with_settings(_INFOS)
def worker(*, flags: dict[str, Any], debug: _Debug = False) -> None:
    """Take jobs from the queue, run them, and commit their results to S3, until told to stop.

    Calls over HTTP are answered beside; without a queue, they alone.
    """
    with _readable_errors(debug):
        environ = dict(os.environ)
        settings = read_settings(
            environ=environ,
            flags=flags,
            together=("queue_url", "output_prefixes"),
            either=("model", "workflows"),
        )
        only_workflows = settings.model is None
        if only_workflows:
            from worker.workflows.model import named_by  # noqa: PLC0415 (few need it)

            named = asyncio.run(named_by(settings.workflows))
            flags["model"] = named.model
            if named.adapters and settings.enable_lora is None:
                flags["enable_lora"] = "true"
            settings = read_settings(environ=environ, flags=flags)
        properties = local_properties(settings)
        if properties is not None:
            settings = read_settings(environ=environ, flags=flags, properties=properties)
        logs.configure(settings.log_format)
        _let_threads_sleep()
        _open_many_files()
        from worker.app import run_worker  # noqa: PLC0415 (torch)

        asyncio.run(
            run_worker(
                settings,
                lambda text: read_settings(environ=environ, flags=flags, properties=text),
                only_workflows=only_workflows,
            )
        )


@app.command()
@with_settings(_ENQUEUE)
def enqueue(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="One row each.")] = None,
    *,
    flags: dict[str, Any],
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help='JSON lines, a row each: {"input": ..., "adapter": ..., "parameters": {...}}; .gz too. '
            '"-" is stdin, s3://bucket/key an object. Of a folder, or s3://bucket/prefix/, every .jsonl and '
            ".jsonl.gz file, a job each.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME",
            help='One for all rows, or given once for each row; "" is the base model.',
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=JSON", help="For all rows: -p max_new_tokens=64"),
    ] = None,
    job_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The idempotency key. Default: a new one.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="URI", help="Default: the first of OUTPUT_PREFIXES, else the worker's."
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put each PROMPT through the model's chat template, as a user says it."),
    ] = False,
    workflow: Annotated[
        str | None, typer.Option("--workflow", metavar="NAME", help="Put all rows through this workflow.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="generate|score", help="score: how likely are the rows' targets?"),
    ] = None,
    output_format: Annotated[
        str,
        typer.Option("--format", metavar="native|openai|bedrock", help="The form of the result lines."),
    ] = "native",
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, help="Wait so long for the results, and print them."
        ),
    ] = None,
    debug: _Debug = False,
) -> None:
    """Put a job on the queue and print its id; with --wait, print its result lines too.

    A file too large for a message goes to the job's output first. With --wait the exit code is 1 when the
    job, or any of its rows, failed.
    """
    with _readable_errors(debug):
        settings = read_settings(environ=dict(os.environ), flags=flags, required=("queue_url",))
        output = output or next(iter(settings.output_prefixes), None)
        for flag, needs_output in (("--wait", wait is not None), ("--format", output_format != "native")):
            if needs_output and output is None:
                raise SettingsError(
                    [f"{flag}: say where the results go; give --output or LORAMILL_OUTPUT_PREFIXES"]
                )
        from worker.sender.client import Order, Written, send_local, send_stored  # noqa: PLC0415 (the AWS SDK)

        place = None if output is None else Output(output, output_format)
        order = Order(
            adapters=adapter,
            parameters=_parameters(parameter),
            workflow=workflow,
            task=task,
            output=place,
        )
        sent = list[Written]()

        def on_sent(written: Written, name: str) -> None:
            sent.append(written)
            typer.echo(f"{written.job_id}\t{name}" if name else written.job_id)

        with _rows(prompts, file, chat=chat) as rows:
            several = rows.endswith("/") if isinstance(rows, str) else len(rows) > 1
            if wait is not None and several:
                raise InvalidMessage(f"--wait: {file} is several jobs; fetch their results one by one")
            url, job_id = str(settings.queue_url), job_id or uuid.uuid4().hex
            if isinstance(rows, str):
                asyncio.run(send_stored(url, rows, order, job_id, on_sent))
            else:
                asyncio.run(send_local(url, rows, order, job_id, on_sent))
        if wait is not None and output is not None:
            _results(output, sent[0].job_id, wait, None, sent[0].digest)


@app.command()
@with_settings(_OUTPUT)
def results(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    *,
    flags: dict[str, Any],
    output: _OutputOption = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", "-o", metavar="FILE", help='Packed if its name ends in .gz. Default: "-", stdout.'
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait so long for the job to end.")
    ] = 0.0,
    debug: _Debug = False,
) -> None:
    """Fetch the result lines of a job, all parts in the order of its rows.

    The exit code is 1 when the job, or any of its rows, failed; lines of rows that did not are there still.
    """
    with _readable_errors(debug):
        _results(_place(flags, output), _job_id(job_id), wait, None if to == Path("-") else to)


@app.command()
@with_settings(_OUTPUT)
def status(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    *,
    flags: dict[str, Any],
    output: _OutputOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again until it has ended; on a terminal, live.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is known as JSON; with --watch, a line for each look.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Tell how far a job is: parts, rows, failures, rate, time left.

    The exit code is 1 when the job failed, any of its rows did, or nothing is known of it.
    """
    with _readable_errors(debug):
        from worker.sender.show_progress import follow  # noqa: PLC0415 (the AWS SDK)

        seen = asyncio.run(follow(_place(flags, output), _job_id(job_id), watch=watch, as_json=as_json))
        if seen.error is not None or seen.rows_failed or seen.state == "unseen":
            raise typer.Exit(FAILED)


@app.command()
@with_settings(_OUTPUT)
def cancel(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    *,
    flags: dict[str, Any],
    output: _OutputOption = None,
    debug: _Debug = False,
) -> None:
    """Have workers start no more rows of a job. The others' results are kept; its manifest says cancelled.

    The exit code is 1 when the job has ended already.
    """
    with _readable_errors(debug):
        from worker.sender.follow import cancel_job  # noqa: PLC0415 (the AWS SDK)

        if not asyncio.run(cancel_job(_place(flags, output), _job_id(job_id))):
            raise LoramillError(f"job {job_id} has ended already")


@app.command()
@with_settings(_QUEUE)
def redrive(
    *,
    flags: dict[str, Any],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Move so many. Default: all.")
    ] = None,
    debug: _Debug = False,
) -> None:
    """Send what is in the queue's dead-letter queue back to the queue, to be tried again."""
    with _readable_errors(debug):
        settings = read_settings(environ=dict(os.environ), flags=flags, required=("queue_url",))
        from worker.sender.client import redrive_all  # noqa: PLC0415 (the AWS SDK)

        with Console(stderr=True).status("moving messages") as status:
            moved, left, source = asyncio.run(
                redrive_all(
                    str(settings.queue_url), limit, lambda moved: status.update(f"{moved} messages moved")
                )
            )
        typer.echo(f"{moved} messages moved from {source}")
        if left.in_flight and limit is None:
            typer.echo(f"loramill: {left.in_flight} messages are in flight there and were not seen", err=True)


@app.command()
@with_settings(_INFOS)
def doctor(
    *,
    flags: dict[str, Any],
    policy: Annotated[
        bool,
        typer.Option("--policy", help="Print the least IAM policy that a worker needs, and look at nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    debug: _Debug = False,
) -> None:
    """Look at queue, store and folders as a worker with these settings would use them.

    The exit code is 1 when anything is found that a worker cannot do without.
    """
    with _readable_errors(debug):
        settings = read_settings(environ=dict(os.environ), flags=flags)
        from worker.doctor import Verdict, examine, least_policy  # noqa: PLC0415 (the AWS SDK)

        if policy:
            if not settings.queue_url and not settings.output_prefixes:
                raise SettingsError(["--policy: say what it is for: queue_url, output_prefixes, model"])
            typer.echo(msgspec.json.format(msgspec.json.encode(least_policy(settings)), indent=2).decode())
            return
        with Console(stderr=True).status("looking"):
            found = asyncio.run(examine(settings))
        if as_json:
            typer.echo(msgspec.json.encode(found).decode())
        else:
            for finding in found:
                typer.echo(f"{finding.verdict:<8} {finding.what}: {' '.join(finding.message.split())}")
        if any(finding.verdict is Verdict.FAILED for finding in found):
            raise typer.Exit(FAILED)


_LOCAL_NAMES = {
    "model", "model_id", "adapters_dir", "cache_dir", "device", "dtype", "trust_remote_code", "max_num_seqs",
    "max_num_batched_tokens", "max_model_len", "memory_share", "kernel_tuning_seconds", "max_passed_over",
    "prefix_reuse", "enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "max_cpu_lora_bytes",
    "lora_dtype", "lora_extra_vocab_size", "tensor_parallel_degree", "fully_sharded_loras",
}  # fmt: skip
_LOCAL = [
    msgspec.structs.replace(info, flag="--adapters") if info.name == "adapters_dir" else info
    for info in _INFOS
    if info.name in _LOCAL_NAMES
]


@app.command("run-batch")
@with_settings(_LOCAL)
def run_batch(
    *,
    flags: dict[str, Any],
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help='JSON lines, a row each: native, of OpenAI or of Bedrock; .gz too. "-" is stdin.',
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="One line for each row, in order, errors too; packed if the name ends in .gz.",
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="NAME", help="For rows that name none.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=JSON", help="For all rows: -p max_new_tokens=64"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="generate|score", help="score: how likely are the rows' targets?"),
    ] = None,
    input_format: Annotated[
        str,
        typer.Option(
            "--input-format", metavar="auto|native|openai|bedrock", help="Of the rows; auto looks at each."
        ),
    ] = "auto",
    output_format: Annotated[
        str,
        typer.Option("--format", metavar="native|openai|bedrock", help="The form of the result lines."),
    ] = "native",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output, if it exists, at the end.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Give up the lines of a run that was stopped, and begin anew.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Run the rows of a file with the worker's engine, without AWS; a run that was stopped goes on.

    Whatever stops it, the lines so far lie beside the output, in .NAME.partial, and the same command adds
    those that are missing. The exit code is 1 when a row failed.
    """
    with _readable_errors(debug):
        environ = dict(os.environ)
        settings = read_settings(environ=environ, flags=flags, required=("model",))
        properties = local_properties(settings)
        settings = read_settings(environ=environ, flags=flags, properties=properties)
        _let_threads_sleep()
        _open_many_files()
        from worker.local.run_batch import Batch  # noqa: PLC0415 (the AWS SDK, though nothing is asked of it)
        from worker.local.run_batch import run_batch as run  # noqa: PLC0415

        batch = Batch(
            source=source,
            target=target,
            adapter=adapter,
            parameters=_parameters(parameter),
            task=task,
            input_format=input_format,
            format=output_format,
            overwrite=overwrite,
            restart=restart,
        )
        counts = run(settings, batch).request_counts
        if counts.failed:
            raise LoramillError(f"{counts.failed} of {counts.total} rows failed: see their error")


@app.command()
def demo(
    *,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave it running, and say how to talk to it.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """All of it on this machine: queue, store, model, three adapters, a mixed batch, its results."""
    with _readable_errors(debug):
        from worker.demo.run import run_demo  # noqa: PLC0415 (moto)

        run_demo(keep=keep)


app.add_typer(sync_cli.build_app(known=KNOWN_NAMES))


def main() -> None:
    """Entry point of the `loramill` command."""
    app()


def _let_threads_sleep() -> None:
    """Before torch is imported: its threads wait for each other by spinning, some milliseconds by default.

    When something else runs on one of the cores, the others spin for the one that has to wait: beside one
    busy process the engine's steps took twice as long as with this, and as long without one.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _place(flags: dict[str, Any], output: str | None) -> str:
    """Where a job's results are."""
    settings = read_settings(environ=dict(os.environ), flags=flags)
    place = output or next(iter(settings.output_prefixes), None)
    if place is None:
        raise SettingsError(["--output: say where the results are; or set LORAMILL_OUTPUT_PREFIXES"])
    if not place.startswith("s3://"):
        raise SettingsError([f"--output: {place!r} is not of the form s3://bucket/prefix/"])
    return place


def _job_id(text: str) -> str:
    if not is_job_id(text):
        raise InvalidMessage(f"JOB is {text!r}; it must be 1 to 128 of A-Z a-z 0-9 . _ -, and not . or ..")
    return text


def _results(output: str, job_id: str, wait: float, to: Path | None, digest: str | None = None) -> None:
    """Print or save the results of a job. Raises LoramillError when a row failed, too."""
    from worker.sender.follow import fetch_results  # noqa: PLC0415 (the AWS SDK)

    sys.stdout.flush()  # what was printed before goes before
    target = to or sys.stdout.buffer
    with Console(stderr=True).status("waiting for the results") as status:
        fetching = fetch_results(
            output,
            job_id,
            wait,
            target,
            digest=digest,
            on_manifest=status.stop if to is None else lambda: None,
        )
        try:
            manifest = asyncio.run(fetching)
            sys.stdout.flush()
        except OSError as exc:
            raise LoramillError(f"{to or 'stdout'}: {exc.strerror}") from exc
    counts = manifest.request_counts
    if counts.failed:
        raise LoramillError(f"{counts.failed} of {counts.total} rows failed: see their error")


def _open_many_files() -> None:
    """Take what the system grants of open files: each adapter version in use is one, connections are others.

    Systems begin with 1024, for the sake of `select`, which nothing here uses.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _rows(
    prompts: list[str] | None, file: str | None, *, chat: bool
) -> Iterator[str | list[tuple[str, LocalFile | list[Any]]]]:
    """What jobs are to be made of: a URI, or rows and files with their names, good for the block."""
    if bool(prompts) == bool(file):
        raise InvalidMessage("give either prompts or --file")
    if file is None:
        said = list(prompts or ())
        yield [("", [{"messages": [{"role": "user", "content": one}]} for one in said] if chat else said)]
    elif file.startswith("s3://"):
        yield file
    elif file == "-":
        with from_stdin() as path:
            yield [("", read_file(path, file))]
    else:
        yield [(name, read_file(path, str(path))) for name, path in find_files(file)]


def _parameters(given: list[str] | None) -> dict[str, Any]:
    parameters = {}
    for item in given or ():
        name, equals, text = item.partition("=")
        if not equals:
            raise InvalidMessage(f"--parameter {item!r} is not of the form NAME=JSON")
        try:
            parameters[name] = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError) as exc:
            raise InvalidMessage(f"--parameter {name}: {text!r} is not JSON: {exc}") from exc
    return parameters


@contextmanager
def _readable_errors(debug: bool) -> Iterator[None]:
    """An error of ours is a line on stderr, or one for each mistake; exit code 2 for misuse, else 1."""
    try:
        yield
    except (LoramillError, SyncError) as error:
        if debug:
            raise
        mistakes = getattr(error, "mistakes", [str(error)])
        for mistake in mistakes:
            typer.echo(f"loramill: {' '.join(mistake.split())}", err=True)
        misuse = isinstance(error, SettingsError | InvalidMessage)
        raise typer.Exit(MISUSED if misuse else FAILED) from None


if __name__ == "__main__":
    main()
