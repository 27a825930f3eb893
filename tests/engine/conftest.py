"""One tiny Llama, with some adapters, for all tests that only read them."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def adapters(llama, tmp_path_factory) -> list[Path]:
    """Twelve adapters of `llama`, no two alike."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        tiny.make_adapter(
            folder / f"adapter{number}",
            llama,
            seed=number + 1,
            r=2 + number % 3,
            lora_alpha=8,
            target_modules=[tiny.ATTENTION, tiny.MLP, [*tiny.ATTENTION, *tiny.MLP]][number % 3],
        )
        for number in range(12)
    ]
