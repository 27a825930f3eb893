"""Settings of the whole suite."""

import functools
import os
from collections.abc import Iterator

import pytest
from botocore.loaders import JSONFileLoader

# Tiny models gain nothing from threads, and lose much when the cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _service_models_read_once() -> Iterator[None]:
    """Each new client parses S3's description again, which takes longer than most tests with one."""
    load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda self, path: load(path))
        yield
