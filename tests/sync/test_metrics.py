import pytest
from prometheus_client import CollectorRegistry

from adapters_sync.events import EventOutcome
from adapters_sync.metrics import SyncMetrics
from adapters_sync.report import FailureKind, PassReport
from adapters_sync.state import AdapterState, AdapterStatus


@pytest.fixture
def registry():
    return CollectorRegistry()


def adapter(name, state):
    return AdapterStatus(name=name, state=state)


def test_a_pass_becomes_numbers(registry):
    metrics = SyncMetrics(registry)
    report = PassReport(
        ok=True,
        finished_at=1234.0,
        seconds=2.0,
        adapters=(
            adapter("a", AdapterState.READY),
            adapter("b", AdapterState.READY),
            adapter("c", AdapterState.INVALID),
        ),
        published=("a@1",),
        deleted=("x", "y"),
        collected=3,
        fetched_bytes=500,
        failures={FailureKind.INVALID: 1},
    )
    metrics.observe(report)
    metrics.observe(report)
    value = registry.get_sample_value
    assert value("loramill_sync_last_success_timestamp_seconds") == 1234
    assert value("loramill_sync_adapters", {"state": "ready"}) == 2
    assert value("loramill_sync_adapters", {"state": "pending"}) == 0
    assert value("loramill_sync_adapters", {"state": "invalid"}) == 1
    assert value("loramill_sync_fetched_bytes_total") == 1000
    assert value("loramill_sync_pass_seconds_sum") == 4
    assert value("loramill_sync_passes_total", {"outcome": "ok"}) == 2
    assert value("loramill_sync_changes_total", {"change": "deleted"}) == 4
    assert value("loramill_sync_changes_total", {"change": "collected"}) == 6
    assert value("loramill_sync_failures_total", {"kind": "invalid"}) == 2


def test_a_failed_pass_keeps_what_is_known(registry):
    metrics = SyncMetrics(registry)
    metrics.observe(PassReport(ok=True, finished_at=1.0, adapters=(adapter("a", AdapterState.READY),)))
    metrics.observe(PassReport(ok=False, finished_at=2.0, error="no", failures={FailureKind.LIST: 1}))
    value = registry.get_sample_value
    assert value("loramill_sync_last_success_timestamp_seconds") == 1
    assert value("loramill_sync_adapters", {"state": "ready"}) == 1
    assert value("loramill_sync_passes_total", {"outcome": "failed"}) == 1
    assert value("loramill_sync_failures_total", {"kind": "list"}) == 1


def test_events_are_counted_by_outcome(registry):
    metrics = SyncMetrics(registry)
    for outcome in (EventOutcome.HINT, EventOutcome.HINT, EventOutcome.UNREADABLE):
        metrics.count_event(outcome)
    counts = [
        registry.get_sample_value("loramill_sync_events_total", {"outcome": outcome})
        for outcome in EventOutcome
    ]
    assert counts == [2, 0, 1]


def test_the_labels_are_bounded_and_all_there_from_the_start(registry):
    SyncMetrics(registry)
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    labels = {(key, value) for sample in samples for key, value in sample.labels.items() if key != "le"}
    assert labels == (
        {("state", state.value) for state in AdapterState}
        | {("kind", kind.value) for kind in FailureKind}
        | {("outcome", "ok"), ("outcome", "failed")}
        | {("outcome", outcome.value) for outcome in EventOutcome}
        | {("change", change) for change in ("published", "deleted", "collected")}
    )
