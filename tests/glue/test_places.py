"""Where what is to be registered lies, and what is said when it cannot be had."""

import asyncio
import json
from pathlib import Path

import pytest

from worker.adapters.places import path_of_url, reading
from worker.errors import (
    InvalidRegistration,
    InvalidWorkflow,
    ObjectNotFound,
    RegistryUnavailable,
    StoreRefused,
    StoreUnavailable,
)
from worker.transport.memory import MemoryStore
from worker.workflows.files import fetch_workflow


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///srv/my%20adapter", "/srv/my adapter"),
        ("file://localhost/srv/a", "/srv/a"),
        ("/srv/my%20adapter", "/srv/my%20adapter"),
        ("some/where", "some/where"),
    ],
)
def test_a_file_url_is_the_path_that_it_means(url: str, path: str) -> None:
    assert path_of_url(url, "src") == path


@pytest.mark.parametrize(
    "url", ["file://elsewhere/a", "file:///%ff", "file:///a?x=1", "file:///a#b", "file://["]
)
def test_a_file_url_of_no_path_here_is_refused_by_its_field(url: str) -> None:
    with pytest.raises(InvalidRegistration, match=r"^url: 'file://"):
        path_of_url(url, "url")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ObjectNotFound("s3://b/k"), InvalidWorkflow("src is 's3://b/'; there is no s3://b/k")),
        (StoreRefused("denied"), InvalidWorkflow("src is 's3://b/', which cannot be read: denied")),
        (StoreUnavailable("busy"), RegistryUnavailable("src is 's3://b/', which cannot be read now: busy")),
    ],
)
def test_what_will_not_mend_is_the_callers_mistake_and_the_rest_is_not(
    raised: Exception, said: Exception
) -> None:
    with pytest.raises(type(said)) as found, reading("src is 's3://b/'", InvalidWorkflow):
        raise raised
    assert str(found.value) == str(said)


def test_a_workflow_is_read_from_a_file_url(tmp_path: Path) -> None:
    folder = tmp_path / "my flows"
    folder.mkdir()
    flow = {"name": "w", "models": {"m": "s3://bucket/llama/"}, "workflow": {"out": ["m", "in"]}}
    (folder / "workflow.json").write_text(json.dumps(flow))
    url = folder.as_uri()
    assert "%20" in url
    assert asyncio.run(fetch_workflow(url, MemoryStore())).name == "w"
