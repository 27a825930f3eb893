"""Prometheus metrics of the mirror: a PassReport goes in, numbers come out. No label names an adapter."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from adapters_sync.events import EventOutcome
from adapters_sync.report import FailureKind, PassReport
from adapters_sync.state import AdapterState

_PASS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class SyncMetrics:
    """The mirror's metrics in one registry. Every label value exists from the start, at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._last_success = Gauge(
            "loramill_sync_last_success_timestamp_seconds",
            "Unix time of the latest pass with a complete listing; 0 before the first.",
            registry=registry,
        )
        self._adapters = Gauge(
            "loramill_sync_adapters",
            "Adapters by what became of their newest upload.",
            ["state"],
            registry=registry,
        )
        self._pass_seconds = Histogram(
            "loramill_sync_pass_seconds", "Duration of a pass.", buckets=_PASS_BUCKETS, registry=registry
        )
        self._passes = Counter("loramill_sync_passes", "Passes by outcome.", ["outcome"], registry=registry)
        self._fetched_bytes = Counter(
            "loramill_sync_fetched_bytes", "Bytes of adapters read from S3 and published.", registry=registry
        )
        self._changes = Counter(
            "loramill_sync_changes", "Changes on disk by kind.", ["change"], registry=registry
        )
        self._failures = Counter(
            "loramill_sync_failures",
            "Failed passes and failed adapters by kind.",
            ["kind"],
            registry=registry,
        )
        self._events = Counter(
            "loramill_sync_events",
            "Messages about S3 events: hint (of a key that is mirrored), other, unreadable.",
            ["outcome"],
            registry=registry,
        )
        for state in AdapterState:
            self._adapters.labels(state)
        for event_outcome in EventOutcome:
            self._events.labels(event_outcome)
        for outcome in ("ok", "failed"):
            self._passes.labels(outcome)
        for change in ("published", "deleted", "collected"):
            self._changes.labels(change)
        for kind in FailureKind:
            self._failures.labels(kind)

    def observe(self, report: PassReport) -> None:
        """Count one pass. A failed pass leaves what is known about the adapters as it was."""
        self._passes.labels("ok" if report.ok else "failed").inc()
        self._pass_seconds.observe(report.seconds)
        self._fetched_bytes.inc(report.fetched_bytes)
        self._changes.labels("published").inc(len(report.published))
        self._changes.labels("deleted").inc(len(report.deleted))
        self._changes.labels("collected").inc(report.collected)
        for kind, count in report.failures.items():
            self._failures.labels(kind).inc(count)
        if report.ok:
            self._last_success.set(report.finished_at)
            for state in AdapterState:
                self._adapters.labels(state).set(sum(one.state is state for one in report.adapters))

    def count_event(self, outcome: EventOutcome) -> None:
        """Count one message of the queue of S3 events."""
        self._events.labels(outcome).inc()
