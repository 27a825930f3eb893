"""The floors of the house: imports only go down, and each floor keeps out what is not its own.

floor 3   worker.{app,cli,core,demo,engine_side,...}             adapters_sync.{cli,serve,show}
floor 2   worker.{bridge,delivery,adapters,http,sender,...}    adapters_sync.{reconcile,passes,push,workshop}
floor 1   worker.{engine,transport,metrics}                    adapters_sync.{remote,fetch,plan,publish,...}
floor 0   worker.{errors,jobs,settings,wire}                   adapters_sync.{layout,errors,settings,...}
"""

import ast
import functools
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("worker", "adapters_sync")

FLOORS = [
    {
        "worker.child", "worker.djl_options", "worker.errors", "worker.jobs", "worker.settings",
        "worker.wire",
        "worker.adapters.places", "worker.adapters.registrations",
        "worker.workflows.definition",
        "adapters_sync.base_model", "adapters_sync.errors", "adapters_sync.events", "adapters_sync.folder",
        "adapters_sync.header", "adapters_sync.hold", "adapters_sync.layout", "adapters_sync.logs",
        "adapters_sync.manifests", "adapters_sync.names", "adapters_sync.paths", "adapters_sync.settings",
        "adapters_sync.state", "adapters_sync.tasks", "adapters_sync.uris",
    },
    {
        "worker.engine", "worker.metrics", "worker.transport",
        "adapters_sync.complete", "adapters_sync.disk", "adapters_sync.event_queue", "adapters_sync.fetch",
        "adapters_sync.inventory", "adapters_sync.listing", "adapters_sync.memory", "adapters_sync.metrics",
        "adapters_sync.options", "adapters_sync.pace", "adapters_sync.plan", "adapters_sync.publish",
        "adapters_sync.remote", "adapters_sync.report", "adapters_sync.room", "adapters_sync.shortcut",
    },
    {
        "worker.bridge", "worker.custom", "worker.doctor", "worker.http", "worker.model_source",
        "worker.stats", "worker.turns",
        "worker.adapters.directory", "worker.adapters.folder_view", "worker.adapters.info",
        "worker.adapters.registry", "worker.adapters.residents", "worker.adapters.room",
        "worker.delivery.commit", "worker.delivery.cutting", "worker.delivery.flow",
        "worker.delivery.in_order", "worker.delivery.inputs", "worker.delivery.intake",
        "worker.delivery.row_runner", "worker.delivery.rows", "worker.delivery.runner",
        "worker.delivery.splitter", "worker.delivery.spool",
        "worker.local.input", "worker.local.output", "worker.local.signals",
        "worker.sender.client", "worker.sender.files", "worker.sender.follow", "worker.sender.progress",
        "worker.sender.redrive",
        "worker.workflows.chain", "worker.workflows.files", "worker.workflows.registry",
        "adapters_sync.listener", "adapters_sync.management", "adapters_sync.passes", "adapters_sync.push",
        "adapters_sync.reconcile", "adapters_sync.survey", "adapters_sync.workshop",
    },
    {
        "worker.app", "worker.cli", "worker.core", "worker.demo", "worker.options",
        "worker.answerer", "worker.engine_side", "worker.handler_side", "worker.own_mirror",
        "worker.queue_side", "worker.tell_mirrors",
        "worker.adapters.shelf", "worker.adapters.sources",
        "worker.workflows.model",
        "worker.local.progress", "worker.local.rows", "worker.local.run_batch",
        "worker.sender.show_progress",
        "adapters_sync.__main__", "adapters_sync.cli", "adapters_sync.serve", "adapters_sync.show",
    },
]  # fmt: skip

APART = ("worker.engine", "worker.transport", "worker.metrics")
"""Parts of one floor that never import each other."""

SHARED_GROUND = {"adapters_sync.layout", "adapters_sync.settings"}
"""What any module of the worker may import of adapters_sync; only floor 3 may import more."""

AWS = {"aioboto3", "aiobotocore", "botocore", "boto3"}
TORCH = {"torch", "transformers", "peft", "safetensors", "tokenizers"}
FORBIDDEN = {
    "worker.engine": AWS | {"asyncio", "aiohttp", "prometheus_client"},
    "worker.transport": TORCH | {"prometheus_client"},
    "worker.metrics": AWS | TORCH | {"asyncio", "aiohttp"},
    **dict.fromkeys(
        ("worker.custom", "worker.http", "worker.adapters.registry", "worker.adapters.residents"), AWS | TORCH
    ),
    **{
        module: AWS | TORCH | {"asyncio", "aiohttp", "prometheus_client"}
        for module in FLOORS[0]
        if module != "adapters_sync.tasks"
    },
    "adapters_sync": TORCH,
}
AWS_IS_CALLED_FROM = {"worker.transport.clients", "adapters_sync.event_queue", "adapters_sync.remote"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def parsed(path: Path) -> ast.Module:
    """The file's syntax tree.

    Without the garbage collector: what it buries may log a traceback, which parses too, and a parser in a
    parser is an error in Python 3.11 (gh-106905).
    """
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names of everything a file imports, wherever in the file, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def floor_of(name: str) -> int | None:
    """The floor of a module, or of a name imported from one; None for the packages themselves."""
    floors = [number for number, parts in enumerate(FLOORS) for part in parts if inside(name, part)]
    return floors[0] if floors else None


def ours(name: str) -> bool:
    return any(inside(name, package) for package in PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_floor_and_imports_only_go_down(module: str) -> None:
    floor = floor_of(module)
    if floor is None and MODULES[module].name == "__init__.py":  # a package whose modules are on several
        assert not imports(MODULES[module])
        return
    assert floor is not None, f"{module} is on no floor: give it one in FLOORS"
    for name in filter(ours, imports(MODULES[module])):
        below = floor_of(name)
        assert below is not None, f"{module} imports {name}, which is on no floor"
        assert below <= floor, f"{module} (floor {floor}) imports {name} (floor {below})"


@pytest.mark.parametrize("module", MODULES)
def test_engine_transport_and_metrics_stay_apart(module: str) -> None:
    own = [part for part in APART if inside(module, part)]
    if own:
        others = [part for part in APART if part not in own]
        assert not [n for n in imports(MODULES[module]) if any(inside(n, other) for other in others)]


@pytest.mark.parametrize("module", MODULES)
def test_the_two_packages_meet_only_on_shared_ground(module: str) -> None:
    names = set(filter(ours, imports(MODULES[module])))
    if inside(module, "adapters_sync"):
        assert not [name for name in names if inside(name, "worker")]
    elif floor_of(module) != 3:
        sync = [name for name in names if inside(name, "adapters_sync")]
        assert not [name for name in sync if not any(inside(name, part) for part in SHARED_GROUND)]


@pytest.mark.parametrize("module", MODULES)
def test_each_part_keeps_out_what_is_not_its_own(module: str) -> None:
    forbidden = set().union(*(names for part, names in FORBIDDEN.items() if inside(module, part)))
    assert not [n for n in imports(MODULES[module]) if n.partition(".")[0] in forbidden]


def test_the_aws_sdk_is_behind_few_doors() -> None:
    users = {m for m, path in MODULES.items() if any(n.partition(".")[0] in AWS for n in imports(path))}
    assert users == AWS_IS_CALLED_FROM


def test_the_engine_package_is_empty_so_that_the_scheduler_needs_no_torch() -> None:
    assert not (ROOT / "worker" / "engine" / "__init__.py").read_text().strip()


@pytest.mark.parametrize(
    ("module", "poison"),
    [
        ("worker.engine.scheduler", TORCH | AWS),
        ("worker.transport.store", TORCH),
        ("worker.transport.memory", TORCH),
        ("worker.settings", TORCH | AWS),
        ("worker.wire", TORCH | AWS),
        ("worker.metrics", TORCH | AWS),
        ("worker.http.server", TORCH | AWS),
        ("worker.cli", TORCH),
        ("worker.engine.engine", AWS | {"triton"}),
        ("adapters_sync.cli", TORCH),
        ("adapters_sync.layout", TORCH | AWS | {"aiohttp"}),
    ],
)
def test_imports_without_what_it_must_not_need(module: str, poison: set[str]) -> None:
    code = f"import sys\nfor name in {sorted(poison)!r}: sys.modules[name] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_else_stands_at_the_top_level() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    # What is no checkout was unpacked, and has nothing that was built or kept beside.
    listed = tracked.split() or [path.name for path in ROOT.iterdir()]
    allowed = {*PACKAGES, "tests", "docker", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    visible = {name.partition("/")[0] for name in listed if not name.startswith(".")}
    assert visible <= allowed
