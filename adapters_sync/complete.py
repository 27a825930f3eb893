"""Has an upload ended? Pure.

S3 has no folders and no transactions: an adapter is several objects that appear one by one, in any order,
over any time. An upload counts as complete when

  (a) `_manifest.json` matches the listing: same files, same sizes (the digests are compared after the
      download); or
  (b) `_SUCCESS` is newer than every file; or
  (c) the required files are there and the listing of the adapter has not changed for `settle_seconds`, seen
      at two polls or more.

A manifest that says `"finished": false` overrules (b) and (c): push puts it there first, so that a long
push over an older adapter is never taken for a quiet one. "Newer" in (b) is strict: S3 tells whole seconds,
and within one second the order is not known; then (c) decides.
"""

from collections.abc import Mapping

import msgspec

from adapters_sync.inventory import RemoteAdapter
from adapters_sync.manifests import UploadManifest
from adapters_sync.names import (
    PICKLED_WEIGHTS_FILE,
    REQUIRED_FILES,
    UPLOAD_MANIFEST,
    WEIGHTS_FILE,
    is_carried,
    shown,
)


class Quiet(msgspec.Struct, frozen=True):
    """For how long, and at how many listings in a row, an adapter has looked as it does."""

    seconds: float
    polls: int


class Complete(msgspec.Struct, frozen=True):
    """Fetch it. `sha256` holds what the uploader read, by path; empty when nobody said."""

    sha256: Mapping[str, str] = {}


class Incomplete(msgspec.Struct, frozen=True):
    """Look again later."""

    reason: str
    seconds_left: float | None = None
    """When time alone completes it: for how long it has to stay as it is, at least; else None."""


class Hopeless(msgspec.Struct, frozen=True):
    """Said to be complete, and not an adapter."""

    reason: str


Verdict = Complete | Incomplete | Hopeless


def judge(
    adapter: RemoteAdapter, manifest: UploadManifest | None, quiet: Quiet, settle_seconds: float
) -> Verdict:
    """Apply (a), (b) and (c) to a listed adapter. `manifest` is its `_manifest.json`, if it has one."""
    missing = _missing(adapter)
    difference = None
    if manifest is not None:
        if not manifest.finished:
            return Incomplete(f"an upload has begun and not ended: {UPLOAD_MANIFEST} says finished: false")
        difference = _difference(adapter, manifest)
        if difference is None:
            sha256 = {file.name: file.sha256 for file in manifest.files}
            return Hopeless(missing) if missing else Complete(sha256)
    if _success_is_newest(adapter):
        return Hopeless(missing) if missing else Complete()
    if missing:
        return Hopeless(missing) if _is_pickled(adapter) else Incomplete(missing)
    if quiet.polls >= 2 and quiet.seconds >= settle_seconds:
        return Complete()
    reason = f"waiting for the listing to stay unchanged for {settle_seconds:g} s"
    left = max(0.0, settle_seconds - quiet.seconds)
    return Incomplete(reason if difference is None else f"{difference}; {reason}", seconds_left=left)


def _missing(adapter: RemoteAdapter) -> str | None:
    absent = [name for name in REQUIRED_FILES if not adapter.has(name)]
    if WEIGHTS_FILE in absent and _is_pickled(adapter):
        return f"the weights are a pickle ({PICKLED_WEIGHTS_FILE}); save them as {WEIGHTS_FILE}"
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else None


def _is_pickled(adapter: RemoteAdapter) -> bool:
    return PICKLED_WEIGHTS_FILE in adapter.skipped and not adapter.has(WEIGHTS_FILE)


def _success_is_newest(adapter: RemoteAdapter) -> bool:
    marker = adapter.success
    return marker is not None and all(file.modified < marker.modified for file in adapter.files)


def _difference(adapter: RemoteAdapter, manifest: UploadManifest) -> str | None:
    """The first way in which listing and manifest disagree about the files that are carried, or None."""
    code = adapter.with_code
    declared = {file.name: file.size for file in manifest.files if is_carried(file.name, code=code)}
    listed = {file.path: file.size for file in adapter.files}
    for path in sorted(declared.keys() | listed.keys()):
        if path not in listed:
            return f"{UPLOAD_MANIFEST} names {shown(path)}, which is not there"
        if path not in declared:
            return f"{UPLOAD_MANIFEST} does not name {shown(path)}"
        if declared[path] != listed[path]:
            return f"{shown(path)} has {listed[path]} bytes, and {UPLOAD_MANIFEST} says {declared[path]}"
    return None
