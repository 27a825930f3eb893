"""Where things are on the volume, and what one version of one adapter on it is called."""

import os
import re
from functools import cached_property
from pathlib import Path

import msgspec

from adapters_sync.names import PUBLISHED_MANIFEST

_VERSION = re.compile(r"[0-9a-f]{64}")
_VERSIONS = ".versions"


class MirrorPaths(msgspec.Struct, frozen=True, dict=True):
    """Where things are, from the adapters folder. All but the links live beside it, in its parent."""

    adapters_dir: Path

    @cached_property
    def versions(self) -> Path:
        return self.adapters_dir.parent / _VERSIONS

    @cached_property
    def staging(self) -> Path:
        return self.adapters_dir.parent / ".staging"

    @property
    def state_file(self) -> Path:
        return self.adapters_dir.parent / ".state.json"

    @property
    def lock_file(self) -> Path:
        return self.adapters_dir.parent / ".lock"

    @property
    def base_model_file(self) -> Path:
        return self.adapters_dir.parent / ".base_model.json"

    def link(self, name: str) -> Path:
        return self.adapters_dir / name

    def version_dir(self, name: str, version: str) -> Path:
        return self.versions.joinpath(name, version)

    def manifest(self, name: str, version: str) -> Path:
        return self.version_dir(name, version) / PUBLISHED_MANIFEST

    def link_target(self, name: str, version: str) -> str:
        """What the link of an adapter says: relative, so that the volume can be mounted anywhere."""
        return f"../{_VERSIONS}/{name}/{version}"

    def linked_version(self, name: str) -> str | None:
        """The version that the link of this name points to; None when there is no such link of ours."""
        try:
            # Not through Path, which takes longer than the call: a pass asks for every adapter.
            target = os.readlink(f"{self.adapters_dir}/{name}")  # noqa: PTH115
        except OSError:
            return None
        version = target.rpartition("/")[2]
        return version if is_version(version) and target == self.link_target(name, version) else None


class AdapterFolder(msgspec.Struct, frozen=True):
    """One version of one adapter on disk."""

    name: str
    version: str
    path: Path
    """The version's own folder, links resolved. Below `.versions` its content never changes."""

    @property
    def is_published(self) -> bool:
        """True for a version that the mirror keeps, False for a plain folder of somebody else's."""
        return self.path.parts[-3:] == (_VERSIONS, self.name, self.version)


def is_version(text: str) -> bool:
    """True for 64 lower-case hexadecimal digits."""
    return _VERSION.fullmatch(text) is not None
