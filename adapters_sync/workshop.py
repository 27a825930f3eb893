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
from adapters_sync.fetch import Arrived, Previous, bytes_to_fetch, fetch, prepare
from adapters_sync.folder import AdapterSummary, check_folder
from adapters_sync.inventory import Limits, RemoteAdapter, RemoteFile
from adapters_sync.layout import MirrorPaths
from adapters_sync.manifests import PublishedFile, PublishedManifest, UploadManifest
from adapters_sync.names import MODEL_PY, UPLOAD_MANIFEST
from adapters_sync.remote import Remote
from adapters_sync.report import FailureKind, Trouble
from adapters_sync.room import Claim, Room
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
        staging = self._paths.staging / adapter.name
        previous = self._previous(adapter.name, before)
        needed_bytes = bytes_to_fetch(adapter, previous)
        with self._room.claim(needed_bytes) as claim:
            begun = await in_thread(self._begin, adapter, staging, previous, claim)
            if isinstance(begun, PublishedManifest):
                return Outcome(on_disk=OnDisk(adapter.version, begun))
            arrived = await fetch(self._remote, adapter, staging, linked=begun, gate=self._gate)
            manifest = await in_thread(self._finish, adapter, staging, arrived, sha256)
            claim.used(arrived.fetched_bytes)
        return Outcome(on_disk=OnDisk(adapter.version, manifest), fetched_bytes=arrived.fetched_bytes)

    def _begin(
        self, adapter: RemoteAdapter, staging: Path, previous: Previous | None, claim: Claim
    ) -> PublishedManifest | dict[str, PublishedFile]:
        """Serve a version that is on the volume since other times; for any other make a staging folder.

        Returns the version's manifest, or the files that lie in staging already.
        """
        name, version = adapter.name, adapter.version
        if manifest := disk.load(self._paths, name, version):
            self._check(self._paths.version_dir(name, version))
            publish.flip(self._paths, name, version, self._time())
            return manifest
        claim.check()
        return prepare(staging, adapter, previous)

    def _finish(
        self, adapter: RemoteAdapter, staging: Path, arrived: Arrived, sha256: Mapping[str, str]
    ) -> PublishedManifest:
        """From what has arrived to what is served, in one change of threads."""
        files = arrived.finish(sha256)
        manifest = self._manifest(adapter, files, self._check(staging))
        publish.seal(staging, manifest, manifest.published_at)
        publish.install(self._paths, staging, adapter.name, adapter.version)
        publish.flip(self._paths, adapter.name, adapter.version, self._time())
        return manifest

    def _check(self, folder: Path) -> AdapterSummary:
        return check_folder(folder, max_rank=self._limits.rank, base=self._base.model)

    def _manifest(
        self, adapter: RemoteAdapter, files: tuple[PublishedFile, ...], summary: AdapterSummary
    ) -> PublishedManifest:
        return PublishedManifest(
            name=adapter.name,
            version=adapter.version,
            source=str(self._remote.source.below(adapter.name)),
            published_at=self._time(),
            rank=summary.rank,
            bytes=summary.bytes,
            files=files,
            left_out_code=MODEL_PY in adapter.skipped,
        )

    def _previous(self, name: str, before: OnDisk | None) -> Previous | None:
        if before is None or before.manifest is None:
            return None
        return Previous(self._paths.version_dir(name, before.manifest.version), before.manifest)


def _failed(what: str, name: str, trouble: Trouble) -> Outcome:
    _logger.warning(what, extra={"adapter": name, "kind": trouble.kind, "reason": trouble.reason})
    return Outcome(trouble=trouble)
