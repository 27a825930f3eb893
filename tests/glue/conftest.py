"""One tiny base model with adapters for all tests here."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("glue") / "base")


@pytest.fixture(scope="session")
def adapter_paths(base: Path) -> list[Path]:
    """Six adapters that say different things."""
    return [
        tiny.make_adapter(base.parent / "adapters" / f"a{n}", base, seed=n, r=4, target_modules=tiny.MLP)
        for n in range(6)
    ]
