"""One tiny Llama, with some adapters, and one model of each kind, for all tests that only read them."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from tests import tiny
from tests.engine.harness import Harness
from tests.engine.zoo import Kind


@pytest.fixture(scope="session")
def kind(tmp_path_factory) -> Callable[[str], Kind]:
    """By its architecture, a base model and adapters, made when they are first wanted."""
    return functools.cache(lambda name: Kind(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="session", autouse=True)
def _no_model_cards():
    """What PEFT writes about an adapter it saves takes it longer than the saving, and nobody reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)
        yield


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


@pytest.fixture(scope="session")
def _harnesses() -> dict[Any, list[Harness]]:
    return defaultdict(list)


@pytest.fixture
def make_harness(_harnesses) -> Callable[..., Harness]:
    """As `Harness`, but one that an earlier test has had, begun anew, if there is one like it.

    No two in one test are the same one.
    """
    taken = Counter()

    def make(base: Path, **options: Any) -> Harness:
        key = (base, frozenset(options.items()))
        alike = _harnesses[key]
        taken[key] += 1
        if taken[key] > len(alike):
            alike.append(Harness(base, **options))
            return alike[-1]
        return alike[taken[key] - 1].renew()

    return make
