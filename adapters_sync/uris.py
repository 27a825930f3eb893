"""`s3://bucket/prefix/` addresses: where adapters are mirrored from and pushed to."""

import re

import msgspec

from adapters_sync.errors import InvalidUri
from adapters_sync.names import fault_in_name, fault_in_path, shown

ADAPTERS = "adapters"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class S3Prefix(msgspec.Struct, frozen=True):
    """A bucket and a key prefix. The prefix ends with a slash: without one a listing takes siblings too."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def below(self, name: str) -> "S3Prefix":
        return S3Prefix(self.bucket, f"{self.prefix}{name}/")


def parse_prefix(uri: str) -> S3Prefix:
    """Read `s3://bucket/some/prefix`, with or without the last slash; InvalidUri says what is wrong."""
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    path = path.removesuffix("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or not path:
        raise InvalidUri(f"{shown(uri)} is not an s3://bucket/model_id/adapters/ address")
    if fault := fault_in_path(path):
        raise InvalidUri(f"{shown(uri)}: {fault}")
    return S3Prefix(bucket, path + "/")


def parse_push_target(uri: str, default_name: str) -> tuple[S3Prefix, str]:
    """The adapters prefix and the adapter's name meant by `s3://bucket/model_id/adapters/[NAME]`.

    The segment `adapters` decides, not the last slash: a forgotten or an extra slash must not put an
    adapter where no mirror looks.
    """
    target = parse_prefix(uri)
    segments = target.prefix.rstrip("/").split("/")
    if segments[-1] == ADAPTERS and segments[-2:] != [ADAPTERS, ADAPTERS]:
        name = default_name
    elif segments[-2:-1] == [ADAPTERS]:
        name = segments.pop()
    else:
        raise InvalidUri(
            f"{shown(uri)} names no adapters folder: expected s3://bucket/model_id/adapters/[NAME]"
        )
    if fault := fault_in_name(name):
        raise InvalidUri(fault)
    return S3Prefix(target.bucket, "/".join(segments) + "/"), name
