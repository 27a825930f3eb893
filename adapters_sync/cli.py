"""`loramill sync`, `push` and `adapters`: the mirror, the uploader and what there is, without torch."""

import asyncio
import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Meta
from prometheus_client import CollectorRegistry

from adapters_sync import logs
from adapters_sync.errors import InvalidUri, SettingsError, SyncError
from adapters_sync.inventory import Limits
from adapters_sync.management import ask_worker, check_url
from adapters_sync.metrics import SyncMetrics
from adapters_sync.options import MirrorOptions
from adapters_sync.push import pack, send
from adapters_sync.reconcile import open_mirror
from adapters_sync.report import PassReport
from adapters_sync.serve import serving
from adapters_sync.settings import SyncSettings, describe, known_names, read
from adapters_sync.show import report_lines, show_survey, showing_progress
from adapters_sync.survey import Survey, survey

FAILED, MISUSED = 1, 2
_logger = logging.getLogger(__name__)


class SyncCommandSettings(SyncSettings, frozen=True, kw_only=True):
    """What `loramill sync` reads."""

    version_grace_seconds: Annotated[
        float, Meta(description="How long a replaced version of an adapter stays on disk.", ge=0)
    ] = 3600.0
    max_adapter_bytes: Annotated[
        int, Meta(description="An adapter with more bytes than this is refused.", ge=1)
    ] = Limits().adapter_bytes
    max_adapters_disk_bytes: Annotated[
        int | None,
        Meta(description="What all versions of all adapters may take on disk; no limit by default.", ge=1),
    ] = None
    http_host: Annotated[str, Meta(description="Address for /metrics, /live and /ready.")] = "127.0.0.1"
    http_port: Annotated[int, Meta(description="Port for them; 0 takes a free one.", ge=0, le=65535)] = 8080


class AdaptersCommandSettings(SyncSettings, frozen=True, kw_only=True):
    """What `loramill adapters` reads."""

    http_token: Annotated[
        str | None,
        Meta(description="Bearer token of the worker at URL.", extra={"flag": "--token", "secret": True}),
    ] = None


_INFO = {info.name: info for info in describe(AdaptersCommandSettings) + describe(SyncCommandSettings)}
_SYNC_FLAGS = tuple(info.name for info in describe(SyncCommandSettings))
_ADAPTERS_FLAGS = ("adapters_dir", "model", "adapters_uri", "cache_dir", "http_token")


def _setting(name: str) -> Any:
    """The flag of a setting. It takes text: the reader checks all settings together."""
    info = _INFO[name]
    if info.kind is bool:
        return typer.Option(f"{info.flag}/--no-{info.flag.removeprefix('--')}", help=info.help)
    return typer.Option(
        info.flag, help=info.help, metavar="|".join(info.allowed) or info.kind.__name__.upper()
    )


_Text = str | None
_Once = Annotated[bool, typer.Option("--once", help="Mirror what is there, then end.")]
_AllowEmpty = Annotated[
    bool, typer.Option("--allow-empty", help="Delete even when no adapter on disk is left in S3.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]


def build_app(known: Collection[str] = ()) -> typer.Typer:
    """The commands, to be run alone or mounted with `parent.add_typer(build_app(...))`.

    `known` names the LORAMILL_ variables of the parent's other commands (settings.known_names): they may
    stand in the environment; any other unknown one is a mistake.
    """
    known = known_names(SyncCommandSettings, AdaptersCommandSettings) | frozenset(known)
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.command()
    def sync(
        context: typer.Context,
        *,
        adapters_uri: Annotated[_Text, _setting("adapters_uri")] = None,
        adapters_dir: Annotated[_Text, _setting("adapters_dir")] = None,
        model: Annotated[_Text, _setting("model")] = None,
        cache_dir: Annotated[_Text, _setting("cache_dir")] = None,
        sync_interval_seconds: Annotated[_Text, _setting("sync_interval_seconds")] = None,
        settle_seconds: Annotated[_Text, _setting("settle_seconds")] = None,
        adapters_events_queue_url: Annotated[_Text, _setting("adapters_events_queue_url")] = None,
        custom_code: Annotated[bool | None, _setting("custom_code")] = None,
        version_grace_seconds: Annotated[_Text, _setting("version_grace_seconds")] = None,
        max_adapter_bytes: Annotated[_Text, _setting("max_adapter_bytes")] = None,
        max_adapters_disk_bytes: Annotated[_Text, _setting("max_adapters_disk_bytes")] = None,
        http_host: Annotated[_Text, _setting("http_host")] = None,
        http_port: Annotated[_Text, _setting("http_port")] = None,
        log_format: Annotated[_Text, _setting("log_format")] = None,
        once: _Once = False,
        allow_empty: _AllowEmpty = False,
        as_json: _Json = False,
        debug: _Debug = False,
    ) -> None:
        """Mirror s3://bucket/model_id/adapters/ to local disk, for ever or once."""
        flags = {name: context.params[name] for name in _SYNC_FLAGS}
        with _readable_errors(debug):
            settings = read(SyncCommandSettings, flags=flags, environ=os.environ, known=known)
            _spare_the_jobs(settings, os.environ)
            logs.configure(settings.log_format)
            failed = asyncio.run(_sync(settings, once=once, allow_empty=allow_empty, as_json=as_json))
        if failed:
            raise typer.Exit(FAILED)

    @app.command()
    def push(
        directory: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter's folder.")],
        uri: Annotated[
            str,
            typer.Argument(metavar="URI", help="s3://bucket/model_id/adapters/[NAME]; NAME is DIR's own."),
        ],
        as_json: _Json = False,
        debug: _Debug = False,
    ) -> None:
        """Check an adapter and upload it, manifest last: no mirror ever sees half of it."""
        with _readable_errors(debug):
            asyncio.run(_push(directory, uri, as_json=as_json))

    @app.command()
    def adapters(
        context: typer.Context,
        *,
        adapters_dir: Annotated[_Text, _setting("adapters_dir")] = None,
        model: Annotated[_Text, _setting("model")] = None,
        adapters_uri: Annotated[_Text, _setting("adapters_uri")] = None,
        cache_dir: Annotated[_Text, _setting("cache_dir")] = None,
        url: Annotated[
            str | None, typer.Option(metavar="URL", help="Ask the worker at http://host:port for the tiers.")
        ] = None,
        http_token: Annotated[_Text, _setting("http_token")] = None,
        as_json: _Json = False,
        debug: _Debug = False,
    ) -> None:
        """List the adapters: version, rank, size, tier, state, and why one is not served."""
        flags = {name: context.params[name] for name in _ADAPTERS_FLAGS}
        with _readable_errors(debug):
            settings = read(AdaptersCommandSettings, flags=flags, environ=os.environ, known=known)
            found = _survey(settings.adapters_path, None if url is None else check_url(url))
            if url is not None:
                found = found.with_worker(asyncio.run(ask_worker(url, settings.http_token)))
        if as_json:
            typer.echo(msgspec.json.encode(found).decode())
            return
        show_survey(found)
        if found.error is not None:
            typer.echo(f"the mirror's last pass failed: {found.error}", err=True)

    return app


def _survey(folder: Path | None, url: str | None) -> Survey:
    """What the folder holds; nothing, when only a worker is asked."""
    if folder is not None and folder.is_dir():
        return survey(folder)
    if url is not None:
        return Survey()
    if folder is None:
        raise SettingsError(["adapters_dir: nothing to list; give --adapters-dir, --model or --url"])
    raise SettingsError([f"adapters_dir: {folder} is not a folder"])


async def _sync(settings: SyncCommandSettings, *, once: bool, allow_empty: bool, as_json: bool) -> bool:
    """Run the mirror; True when it failed."""
    uri, adapters_dir = _where(settings)
    stop = _stop_on_signals()
    registry = CollectorRegistry()
    metrics = SyncMetrics(registry)

    def on_pass(report: PassReport) -> None:
        metrics.observe(report)
        if as_json and not once:
            typer.echo(msgspec.json.encode(report).decode())

    queue_url = None if once else settings.adapters_events_queue_url
    async with open_mirror(uri, adapters_dir, _options(settings, allow_empty), queue_url) as mirror:
        if once:
            report = await mirror.settle(stop, on_pass)
            return _conclude(report, as_json)
        async with serving(settings.http_host, settings.http_port, registry, lambda: mirror.ready) as port:
            _logger.info("mirroring", extra={"source": uri, "to": str(adapters_dir), "port": port})
            await mirror.run(stop, on_pass, metrics.count_event)
            _logger.info("stopped")
    return False


def _spare_the_jobs(settings: SyncCommandSettings, environ: Mapping[str, str]) -> None:
    """A worker's settings may be in the same environment; what the mirror reads from a queue is deleted."""
    url = settings.adapters_events_queue_url
    if url is not None and url == environ.get("LORAMILL_QUEUE_URL"):
        raise SettingsError([f"adapters_events_queue_url: {url!r} must not be LORAMILL_QUEUE_URL"])


def _where(settings: SyncCommandSettings) -> tuple[str, Path]:
    if settings.mirror_uri is None or settings.adapters_path is None:
        raise SettingsError(
            ["adapters_uri: nothing to mirror; give --adapters-uri s3://bucket/model_id/adapters/"]
        )
    return settings.mirror_uri, settings.adapters_path


def _options(settings: SyncCommandSettings, allow_empty: bool) -> MirrorOptions:
    limits = Limits(
        adapter_bytes=settings.max_adapter_bytes,
        disk_bytes=settings.max_adapters_disk_bytes,
        code=settings.custom_code,
    )
    return MirrorOptions(
        interval_seconds=settings.sync_interval_seconds,
        settle_seconds=settings.settle_seconds,
        grace_seconds=settings.version_grace_seconds,
        allow_empty=allow_empty,
        limits=limits,
    )


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _conclude(report: PassReport | None, as_json: bool) -> bool:
    """Print the result of `--once`; True when it failed."""
    if report is None:
        raise SyncError("stopped before the mirror was complete")
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    elif report.ok:
        for line in report_lines(report):
            typer.echo(line)
    if report.error is not None:
        raise SyncError(report.error)
    return not report.ok


async def _push(directory: Path, uri: str, *, as_json: bool) -> None:
    parcel = pack(directory, uri)
    for path, reason in parcel.left_out.items():
        typer.echo(f"left out {path}: {reason}", err=True)
    with showing_progress(parcel.sizes) as progress:
        pushed = await send(parcel, progress)
    if as_json:
        typer.echo(msgspec.json.encode(pushed).decode())
    else:
        typer.echo(f"{pushed.uri} version {pushed.version}")


@contextmanager
def _readable_errors(debug: bool) -> Iterator[None]:
    """An error of ours is a line on stderr and an exit code: 2 for misuse, 1 for the rest."""
    try:
        yield
    except SyncError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            typer.echo(f"loramill: {line}", err=True)
        raise typer.Exit(MISUSED if isinstance(error, SettingsError | InvalidUri) else FAILED) from None


app = build_app()
