"""The two manifests: `_manifest.json`, uploaded last by push, and `manifest.json`, written into each version.

`_manifest.json` is `{"files": [{"name": ..., "size": ..., "sha256": ...}, ...]}`. With `"finished": false` it
is a notice that an upload has begun: while it stands, nothing under that name is published, however long
the upload takes.
"""

from typing import Annotated

import msgspec

MAX_MANIFEST_BYTES = 4 << 20
_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class UploadedFile(msgspec.Struct, frozen=True):
    """One file as its uploader read it. `name` is the path below the adapter's folder."""

    name: str
    size: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    sha256: _Sha256


class UploadManifest(msgspec.Struct, frozen=True):
    """`_manifest.json`. Unknown fields are left for later versions."""

    files: tuple[UploadedFile, ...] = ()
    finished: bool = True


class PublishedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a published version: what it was in S3 and what its content is."""

    name: str
    size: int
    sha256: str
    etag: str
    version_id: str = ""


class PublishedManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json` of a version."""

    name: str
    version: str
    source: str
    """The s3:// prefix it came from."""
    published_at: float
    """Seconds since the Unix epoch."""
    rank: int
    bytes: int
    files: tuple[PublishedFile, ...]
    left_out_code: bool = False
    """Whether a `model.py` lay there too, and was not carried."""

    def file(self, name: str) -> PublishedFile | None:
        return next((file for file in self.files if file.name == name), None)
