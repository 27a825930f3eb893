"""One adapter at a time: fetch, check, install, flip. What goes wrong with it stays with it."""

import asyncio
import logging
from collections.abc import Callable, Container, Mapping
from contextlib import aclosing
from pathlib import Path

import msgspec

from adapters_sync import disk, publish
from adapters_sync.base_model import BaseModelFile
from adapters_sync.disk import OnDisk
from adapters_sync.errors import InvalidAdapter, NoRoom, ObjectChanged, RemoteUnavailable
from adapters_sync.fetch import Fetched, Previous, bytes_to_fetch, fetch
from adapters_sync.folder import AdapterSummary, check_folder
from adapters_sync.inventory import Limits, RemoteAdapter, RemoteFile
from adapters_sync.layout import MirrorPaths
from adapters_sync.manifests import PublishedManifest, UploadManifest
from adapters_sync.names import UPLOAD_MANIFEST
from adapters_sync.remote import Remote
from adapters_sync.report import FailureKind, Trouble
from adapters_sync.room import Room
from adapters_sync.tasks import in_thread

_logger = logging.getLogger(__name__)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt came to: what is served now, or the trouble that kept it from being served."""

    on_disk: OnDisk | None = None
    trouble: Trouble | None = None
    fetched_bytes: int = 0


class Workshop:
    """Publishes adapters onto one volume. The caller holds the mirror's lock.

    `time` tells seconds since the Unix epoch; `files_at_once` bounds the files under way, all adapters
    together; `base` says what adapters must fit.
    """

    def __init__(
        self,
        remote: Remote,
        paths: MirrorPaths,
        limits: Limits,
        time: Callable[[], float],
        files_at_once: int,
        *,
        base: BaseModelFile,
    ) -> None:
        self._remote = remote
        self._paths = paths
        self._limits = limits
        self._time = time
        self._base = base
        self._gate = asyncio.Semaphore(files_at_once)
        self._manifests: dict[str, tuple[RemoteFile, UploadManifest]] = {}
        self._room = Room(paths, limits)

    async def upload_manifest(self, adapter: RemoteAdapter) -> UploadManifest | None:
        """What the adapter's `_manifest.json` says, read once for each upload of it; None when it has none.

        Raises InvalidAdapter for a manifest that is not one, ObjectChanged and RemoteUnavailable.
        """
        if adapter.manifest is None:
            return None
        known = self._manifests.get(adapter.name)
        if known is not None and known[0] == adapter.manifest:
            return known[1]
        key = f"{adapter.name}/{UPLOAD_MANIFEST}"
        async with self._gate, aclosing(self._remote.read(key, adapter.manifest.etag)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        try:
            manifest = msgspec.json.decode(data, type=UploadManifest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidAdapter(f"{UPLOAD_MANIFEST} is not a manifest: {error}") from error
        self._manifests[adapter.name] = (adapter.manifest, manifest)
        return manifest

    async def measure_room(self) -> None:
        """See how much room the volume has. To be called before the first `publish` of a pass."""
        await self._room.measure()

    async def publish(
        self, adapter: RemoteAdapter, sha256: Mapping[str, str], before: OnDisk | None
    ) -> Outcome:
        """Bring a complete upload before the readers. Never raises for reasons of this adapter alone."""
        try:
            outcome = await self._publish(adapter, sha256, before)
        except InvalidAdapter as error:
            trouble = Trouble(FailureKind.INVALID, error.reason)
        except ObjectChanged as error:
            trouble = Trouble(FailureKind.CHANGED, str(error))
        except RemoteUnavailable as error:
            trouble = Trouble(FailureKind.FETCH, str(error))
        except (NoRoom, OSError) as error:
            trouble = Trouble(FailureKind.DISK, str(error))
        except Exception as error:
            _logger.exception("publishing failed by a mistake of ours", extra={"adapter": adapter.name})
            trouble = Trouble(FailureKind.INTERNAL, repr(error))
        else:
            fields = {"adapter": adapter.name, "version": adapter.version, "fetched": outcome.fetched_bytes}
            _logger.info("published an adapter", extra=fields)
            return outcome
        return _failed("could not publish an adapter", adapter.name, trouble)

    async def delete(self, name: str) -> Outcome:
        """Take an adapter away from the readers. Never raises for reasons of this adapter alone."""
        try:
            await in_thread(publish.delete, self._paths, name, self._time())
        except OSError as error:
            return _failed("could not delete an adapter", name, Trouble(FailureKind.DISK, str(error)))
        _logger.info("deleted an adapter", extra={"adapter": name})
        return Outcome()

    def forget_all_but(self, names: Container[str]) -> None:
        """Drop the manifests of adapters that are gone."""
        self._manifests = {name: one for name, one in self._manifests.items() if name in names}

    async def _publish(
        self, adapter: RemoteAdapter, sha256: Mapping[str, str], before: OnDisk | None
    ) -> Outcome:
        name, version = adapter.name, adapter.version
        manifest = await in_thread(disk.load, self._paths, name, version)
        fetched_bytes = 0
        if manifest is None:
            manifest, fetched_bytes = await self._bring(adapter, sha256, self._previous(name, before))
        else:  # on the volume since other times
            await in_thread(self._check, self._paths.version_dir(name, version))
        await in_thread(publish.flip, self._paths, name, version, self._time())
        return Outcome(on_disk=OnDisk(version, manifest), fetched_bytes=fetched_bytes)

    async def _bring(
        self, adapter: RemoteAdapter, sha256: Mapping[str, str], previous: Previous | None
    ) -> tuple[PublishedManifest, int]:
        """Put a version on the volume, where nobody sees it yet; the bytes that came from S3 are told too."""
        staging = self._paths.staging / adapter.name
        async with self._room.claim(bytes_to_fetch(adapter, previous)):
            fetched = await fetch(
                self._remote, adapter, staging, sha256=sha256, previous=previous, gate=self._gate
            )
            manifest = await in_thread(self._check_and_install, adapter, staging, fetched)
        return manifest, fetched.fetched_bytes

    def _check_and_install(
        self, adapter: RemoteAdapter, staging: Path, fetched: Fetched
    ) -> PublishedManifest:
        summary = self._check(staging)
        manifest = self._manifest(adapter, fetched, summary)
        publish.seal(staging, manifest, manifest.published_at)
        publish.install(self._paths, staging, adapter.name, adapter.version)
        return manifest

    def _check(self, folder: Path) -> AdapterSummary:
        return check_folder(folder, max_rank=self._limits.rank, base=self._base.model)

    def _manifest(
        self, adapter: RemoteAdapter, fetched: Fetched, summary: AdapterSummary
    ) -> PublishedManifest:
        return PublishedManifest(
            name=adapter.name,
            version=adapter.version,
            source=str(self._remote.source.below(adapter.name)),
            published_at=self._time(),
            rank=summary.rank,
            bytes=summary.bytes,
            files=fetched.files,
        )

    def _previous(self, name: str, before: OnDisk | None) -> Previous | None:
        if before is None or before.manifest is None:
            return None
        return Previous(self._paths.version_dir(name, before.manifest.version), before.manifest)


def _failed(what: str, name: str, trouble: Trouble) -> Outcome:
    _logger.warning(what, extra={"adapter": name, "kind": trouble.kind, "reason": trouble.reason})
    return Outcome(trouble=trouble)
