"""Where workflow.json files are: on this machine or in S3, by themselves or in a folder."""

import asyncio
import errno
import os
import stat
from pathlib import Path, PurePosixPath

import msgspec

from worker.adapters.places import path_of_url, reading
from worker.errors import InvalidWorkflow
from worker.transport.store import Store
from worker.workflows.definition import MAX_BYTES, Workflow, read_workflow

FILE = "workflow.json"
_S3 = "s3://"


async def fetch_workflow(url: str, store: Store) -> Workflow:
    """Read the workflow at `url`; a folder stands for the FILE in it.

    Adapters and models that it names by relative paths are those beside it. Raises InvalidRegistration, and
    RegistryUnavailable when the store cannot be reached.
    """
    if url.startswith(_S3):
        place = url if url.endswith(".json") else f"{url.rstrip('/')}/{FILE}"
        with reading(f"url is {url!r}", InvalidWorkflow):
            content, _ = await store.get(place, max_bytes=MAX_BYTES)
        folder = place.rpartition("/")[0]
        return _placed(read_workflow(content, folder), folder)
    try:
        folder, content = await asyncio.to_thread(_read, path_of_url(url, "url"))
    except OSError as error:
        raise InvalidWorkflow(f"url is {url!r}, which cannot be read: {error.strerror}") from error
    return _placed(read_workflow(content, folder), folder)


def _read(name: str) -> tuple[str, bytes]:
    path = Path(name).expanduser()
    path = (path / FILE if path.is_dir() else path).absolute()
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        return str(path.parent), file.read(MAX_BYTES + 1)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe that nobody writes to would be waited for, for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _placed(workflow: Workflow, folder: str) -> Workflow:
    replace = msgspec.structs.replace
    return replace(
        workflow,
        models={key: replace(one, url=_beside(one.url, folder)) for key, one in workflow.models.items()},
        adapters={key: replace(one, src=_beside(one.src, folder)) for key, one in workflow.adapters.items()},
    )


def _beside(said: str, folder: str) -> str:
    """A relative path as one in `folder`; anything else, and a local one that is not there, as it is."""
    if "://" in said or PurePosixPath(said).is_absolute():
        return said
    if folder.startswith(_S3):
        return f"{folder}/{said.removeprefix('./')}"
    beside = Path(folder, said)
    return str(beside.resolve()) if beside.exists() else said
