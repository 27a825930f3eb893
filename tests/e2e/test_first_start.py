"""The very first start of a worker with a mirror inside: nothing is on disk yet."""

import json
import os
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.conftest import BUCKET, wait_until
from tests.sync.builders import manifest_of
from tests.sync.events import from_s3

ADAPTERS = f"s3://{BUCKET}/first/adapters/"


@pytest.fixture
def strange(base, tmp_path):
    """An adapter of a base model that is wider than ours, and has the same modules."""
    wide = tiny.make_base(tmp_path / "wide", hidden_size=96)
    return tiny.make_adapter(tmp_path / "strange", wide, r=4, target_modules=tiny.MLP)


def publish(mill, folder, name):
    """Upload an adapter so that the next pass of a mirror takes it, whatever it is for."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["_manifest.json"] = manifest_of(files)
    for path, data in files.items():
        mill.s3.put_object(Bucket=BUCKET, Key=f"first/adapters/{name}/{path}", Body=data)


def test_what_does_not_fit_is_never_linked_and_what_is_heard_of_is_served(
    mill, adapter_paths, strange, tmp_path
):
    for name, path in (("strange", strange), ("red", adapter_paths["red"])):
        publish(mill, path, name)
    folder = tmp_path / "mirrored" / "adapters"
    events = mill.queue()
    told = {
        "LORAMILL_QUEUE_URL": mill.queue().url,
        "LORAMILL_ADAPTERS_URI": ADAPTERS,
        "LORAMILL_ADAPTERS_DIR": str(folder),
        "LORAMILL_ADAPTERS_EVENTS_QUEUE_URL": events.url,
        "LORAMILL_SYNC_INTERVAL_SECONDS": "3600",
    }
    with mill.worker("--sync", **told) as worker:
        worker.wait_ready()
        wait_until(lambda: os.path.lexists(folder / "red"), "the adapter that fits")
        status = wait_until(lambda: _status(folder, "strange"), "what is said of the other")
        assert status["state"] == "invalid"
        assert "the base model needs" in status["reason"]
        assert worker.metric('loramill_sync_changes_total{change="published"}') == 1, (
            "red, and nothing ever else"
        )
        assert not os.path.lexists(folder / "strange")

        publish(mill, adapter_paths["green"], "green")
        events.send(from_s3(BUCKET, "first/adapters/green/adapter_config.json"))
        wait_until(lambda: os.path.lexists(folder / "green"), "the adapter that was heard of")
        assert worker.metric('loramill_sync_events_total{outcome="hint"}') == 1


def _status(folder: Path, name: str) -> dict | None:
    """What the mirror says of an adapter that it has dealt with."""
    try:
        state = json.loads((folder.parent / ".state.json").read_text())
    except FileNotFoundError:
        return None
    found = next((one for one in state["adapters"] if one["name"] == name), None)
    return found if found and found["state"] != "pending" else None
