"""Glue between the core's stats and the metrics."""

from worker.engine.engine import StepStats
from worker.engine.lora_store import StoreStats
from worker.metrics import PHASES, Metrics
from worker.transport.lease import LeaseStats


class Exporter:
    """Turns running totals into counters: it remembers what it has told already."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._store = StoreStats(0, 0, 0, 0, 0, 0)
        self._leases = LeaseStats()
        self._preempted = 0

    def step(self, stats: StepStats) -> None:
        metrics = self._metrics
        metrics.batch_rows.observe(stats.rows)
        metrics.batch_adapters.observe(stats.adapters)
        metrics.tokens.labels("prompt").inc(stats.prompt_tokens)
        metrics.tokens.labels("generated").inc(stats.generated_tokens)
        metrics.prefix_reused_tokens.inc(stats.reused_tokens)
        for phase in PHASES:
            metrics.step_seconds.labels(phase).inc(getattr(stats, f"{phase}_seconds"))
        metrics.engine_rows.labels("running").set(stats.running)
        metrics.engine_rows.labels("waiting").set(stats.waiting)
        metrics.kv_blocks_free.set(stats.free_blocks)
        metrics.adapters_resident.labels("slot").set(stats.resident_adapters)
        metrics.preemptions.inc(stats.preempted - self._preempted)
        self._preempted = stats.preempted

    def store(self, stats: StoreStats) -> None:
        metrics, before, self._store = self._metrics, self._store, stats
        metrics.adapters_resident.labels("host").set(stats.resident)
        metrics.adapters_host_bytes.set(stats.num_bytes)
        metrics.adapter_loads.labels("hit").inc(stats.hits - before.hits)
        metrics.adapter_loads.labels("miss").inc(stats.misses - before.misses)
        metrics.adapter_loads.labels("failed").inc(stats.failures - before.failures)
        metrics.adapter_evictions.inc(stats.evictions - before.evictions)

    def leases(self, stats: LeaseStats, lag_seconds: float) -> None:
        metrics, before, self._leases = self._metrics, self._leases, stats
        metrics.leases_lost.inc(stats.lost - before.lost)
        metrics.heartbeat_failures.inc(stats.extend_failures - before.extend_failures)
        metrics.heartbeat_lag.set(lag_seconds)
