"""What Prometheus is told of what the core says."""

import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from adapters_sync.layout import is_adapter_name
from worker.engine.engine import StepStats
from worker.engine.lora_store import StoreStats
from worker.jobs import AdapterKey, Completion, FinishReason
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
    "loramill_adapter_lookups": {"tier", "result"},
    "loramill_adapter_load_seconds": {"tier"},
    "loramill_adapter_evictions": {"tier"},
    "loramill_adapters_refused": {"reason"},
    "loramill_adapter_rows": {"adapter"},
    "loramill_adapter_tokens": {"adapter", "kind"},
    "loramill_rows_waiting": {"reason"},
    "loramill_http_requests": {"route", "status"},
    "loramill_http_seconds": {"route"},
    "loramill_http_rows": {"outcome"},
}


STORE = StoreStats(
    resident=2, pinned=1, num_bytes=1000, hits=5, misses=3, evictions=1, failures={"tensors": 2}
)


class Scene:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.exporter = Exporter(self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def step(**changes: Any) -> StepStats:
    zeros = dict.fromkeys(StepStats._fields, 0) | {"slot_loads": ()}
    return StepStats(**zeros | changes)


def completion(**changes: Any) -> Completion:
    plain = {"request_id": "1", "text": "", "token_ids": (1, 2), "finish_reason": FinishReason.LENGTH}
    return Completion(**plain | {"prompt_tokens": 5} | changes)


def everything(scene: Scene) -> None:
    """Touch every metric with every label that the worker gives it."""
    scene.exporter.step(step(rows=3, adapters=2, prompt_tokens=5, generated_tokens=2, preempted=1))
    scene.exporter.step(step(slot_loads=(0.1,), slot_hits=1, preempted=1))
    scene.exporter.store(STORE)
    scene.exporter.row(None, completion())
    scene.exporter.waiting(1, 2)
    scene.exporter.leases(LeaseStats(lost=1, extend_failures=2), 0.5)
    for outcome in ("committed", "duplicate", "failed", "dead_letter", "released", "lost"):
        scene.metrics.messages.labels(outcome).inc()
    for outcome in ("completed", "adapter_not_found", "oom"):
        scene.metrics.rows.labels(outcome).inc()
    scene.metrics.http_requests.labels("invocations", "200").inc()
    scene.metrics.http_seconds.labels("invocations").observe(0.2)
    scene.metrics.received.inc()
    scene.metrics.job_seconds.observe(1.5)
    scene.metrics.ready.set(1)


def test_running_totals_become_counters_that_count_once():
    scene = Scene()
    for _ in range(3):
        scene.exporter.store(STORE)
        scene.exporter.leases(LeaseStats(lost=4, extend_failures=6), 0.25)
    scene.exporter.store(STORE._replace(hits=7, resident=1, failures={"tensors": 2, "rank": 1}))
    assert scene.value("loramill_adapter_lookups_total", tier="host", result="hit") == 7
    assert scene.value("loramill_adapter_lookups_total", tier="host", result="miss") == 3
    assert scene.value("loramill_adapters_refused_total", reason="tensors") == 2
    assert scene.value("loramill_adapters_refused_total", reason="rank") == 1
    assert scene.value("loramill_adapter_evictions_total", tier="host") == 1
    assert scene.value("loramill_adapters_pinned") == 1
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


def test_slots_and_loads_are_told_by_tier():
    scene = Scene()
    scene.exporter.step(step(slot_hits=3, slot_misses=2, slot_evictions=1, slot_loads=(0.002, 0.2)))
    scene.exporter.step(step(slot_hits=4, slot_misses=2, slot_evictions=1))
    scene.exporter.store(STORE._replace(load_seconds=(0.5,)))
    assert scene.value("loramill_adapter_lookups_total", tier="slot", result="hit") == 4
    assert scene.value("loramill_adapter_lookups_total", tier="slot", result="miss") == 2
    assert scene.value("loramill_adapter_evictions_total", tier="slot") == 1
    assert scene.value("loramill_adapter_load_seconds_count", tier="slot") == 2
    assert scene.value("loramill_adapter_load_seconds_sum", tier="host") == 0.5


def test_adapters_have_figures_of_their_own_up_to_a_limit():
    """Thousands of adapters must not become thousands of time series."""
    scene = Scene()
    exporter = Exporter(scene.metrics, max_adapters=2)
    for name in ("a", "b", "c", "d", "a"):
        exporter.row(AdapterKey(name, "1"), completion())
    exporter.row(None, completion(prompt_tokens=7))
    assert scene.value("loramill_adapter_rows_total", adapter="a") == 2
    assert scene.value("loramill_adapter_rows_total", adapter="b") == 1
    assert scene.value("loramill_adapter_rows_total", adapter="c") is None
    assert scene.value("loramill_adapter_rows_total", adapter="(others)") == 2
    assert scene.value("loramill_adapter_rows_total", adapter="(base)") == 1
    assert scene.value("loramill_adapter_tokens_total", adapter="(base)", kind="prompt") == 7
    assert scene.value("loramill_adapter_tokens_total", adapter="a", kind="generated") == 4
    assert not is_adapter_name("(others)")
    assert not is_adapter_name("(base)")


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


def test_no_metric_asks_for_a_label_that_names_a_job_and_two_name_adapters():
    scene = Scene()
    labels = {metric._name: set(metric._labelnames) for metric in vars(scene.metrics).values()}
    assert not any({"job", "job_id", "id", "version"} & own for own in labels.values())
    named = {name for name, own in labels.items() if "adapter" in own}
    assert named == {"loramill_adapter_rows", "loramill_adapter_tokens"}


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
