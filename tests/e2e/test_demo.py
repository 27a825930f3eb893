"""`loramill demo` does what the README's first screen promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.demo.base_model import prepare_base_model
from worker.demo.prompts import ADAPTERS, DEMO_PROMPTS
from worker.errors import ModelError


@pytest.fixture(scope="module")
def cache() -> Path:
    folder = Path(os.environ.get("LORAMILL_CACHE_DIR") or Path.home() / ".cache" / "loramill")
    try:
        prepare_base_model(folder, print)
    except ModelError as exc:
        pytest.skip(f"the demo's base model cannot be had here: {exc}")
    return folder


def test_demo_shows_every_adapter_beside_the_base(cache: Path) -> None:
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LORAMILL_"))
    }
    environ |= {"LORAMILL_CACHE_DIR": str(cache), "COLUMNS": "200"}
    environ.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    text = done.stdout
    for sign in ("Arr", "BEEP", '{"answer"', "adapter_not_found", '"status": "completed_with_errors"'):
        assert sign in text, sign
    assert f'"completed": {len(DEMO_PROMPTS) * len(ADAPTERS)}' in text
