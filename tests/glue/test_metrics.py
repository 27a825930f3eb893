"""What Prometheus is told of what the core says."""

import shutil
import subprocess
import typing

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from worker.engine.engine import StepStats
from worker.engine.lora_store import StoreStats
from worker.metrics import Metrics
from worker.stats import Exporter
from worker.transport.lease import LeaseStats

LABELS = {
    "loramill_messages": {"outcome"},
    "loramill_rows": {"outcome"},
    "loramill_tokens": {"kind"},
    "loramill_step_seconds": {"phase"},
    "loramill_engine_rows": {"state"},
    "loramill_adapters_resident": {"tier"},
    "loramill_adapter_loads": {"result"},
}


class Scene:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.exporter = Exporter(self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def step(**changes: float) -> StepStats:
    kinds = typing.get_type_hints(StepStats)
    return StepStats(**{name: kind(changes.get(name, 0)) for name, kind in kinds.items()})


def everything(scene: Scene) -> None:
    """Touch every metric with every label that the worker gives it."""
    scene.exporter.step(step(rows=3, adapters=2, prompt_tokens=5, generated_tokens=2, preempted=1))
    scene.exporter.store(StoreStats(2, 1000, 5, 3, 1, 1))
    scene.exporter.leases(LeaseStats(lost=1, extend_failures=2), 0.5)
    for outcome in ("committed", "duplicate", "failed", "dead_letter", "released", "lost"):
        scene.metrics.messages.labels(outcome).inc()
    for outcome in ("completed", "adapter_not_found", "oom"):
        scene.metrics.rows.labels(outcome).inc()
    scene.metrics.received.inc()
    scene.metrics.job_seconds.observe(1.5)
    scene.metrics.ready.set(1)


def test_running_totals_become_counters_that_count_once():
    scene = Scene()
    totals = StoreStats(resident=2, num_bytes=1000, hits=5, misses=3, evictions=1, failures=2)
    for _ in range(3):
        scene.exporter.store(totals)
        scene.exporter.leases(LeaseStats(lost=4, extend_failures=6), 0.25)
    scene.exporter.store(totals._replace(hits=7, resident=1))
    assert scene.value("loramill_adapter_loads_total", result="hit") == 7
    assert scene.value("loramill_adapter_loads_total", result="miss") == 3
    assert scene.value("loramill_adapter_loads_total", result="failed") == 2
    assert scene.value("loramill_adapter_evictions_total") == 1
    assert scene.value("loramill_adapters_resident", tier="host") == 1
    assert scene.value("loramill_adapters_host_bytes") == 1000
    assert scene.value("loramill_leases_lost_total") == 4
    assert scene.value("loramill_heartbeat_failures_total") == 6
    assert scene.value("loramill_heartbeat_lag_seconds") == 0.25


def test_steps_add_up_and_preemptions_count_once():
    scene = Scene()
    first = step(rows=4, adapters=2, prompt_tokens=10, generated_tokens=3, preempted=2, forward_seconds=1)
    scene.exporter.step(first._replace(free_blocks=7, running=4, waiting=1, resident_adapters=2))
    scene.exporter.step(first._replace(free_blocks=5, running=3, waiting=0, preempted=3))
    assert scene.value("loramill_tokens_total", kind="prompt") == 20
    assert scene.value("loramill_tokens_total", kind="generated") == 6
    assert scene.value("loramill_preemptions_total") == 3
    assert scene.value("loramill_step_seconds_total", phase="forward") == 2
    assert scene.value("loramill_batch_rows_sum") == 8
    assert scene.value("loramill_batch_adapters_count") == 2
    assert scene.value("loramill_engine_rows", state="running") == 3
    assert scene.value("loramill_engine_rows", state="waiting") == 0
    assert scene.value("loramill_kv_blocks_free") == 5


def test_labels_take_their_values_from_short_fixed_lists():
    scene = Scene()
    everything(scene)
    found = {
        family.name: labels
        for family in text_string_to_metric_families(scene.text())
        if (labels := {name for sample in family.samples for name in sample.labels} - {"le"})
        and not family.name.endswith("_created")
    }
    assert found == LABELS


def test_no_metric_asks_for_a_label_that_names_an_adapter_or_a_job():
    scene = Scene()
    for metric in vars(scene.metrics).values():
        assert {"adapter", "job", "job_id", "id"}.isdisjoint(metric._labelnames)


def test_every_metric_says_what_it_is_and_wears_our_name():
    scene = Scene()
    everything(scene)
    for family in text_string_to_metric_families(scene.text()):
        assert family.name.startswith("loramill_")
        assert family.documentation


def test_promtool_has_nothing_to_say_against_the_metrics():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    scene = Scene()
    everything(scene)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scene.text(), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
