"""Glue between the core's stats and the metrics."""

from collections import Counter

from worker.engine.engine import StepStats
from worker.engine.lora_store import StoreStats
from worker.jobs import AdapterKey, Completion
from worker.metrics import BASE, OTHERS, PHASES, Metrics
from worker.transport.lease import LeaseStats


class Exporter:
    """Turns running totals into counters: it remembers what it has told already.

    At most `max_adapters` adapters have figures of their own, those that came first.
    """

    def __init__(self, metrics: Metrics, max_adapters: int = 100) -> None:
        self._metrics = metrics
        self._max_adapters = max_adapters
        self._names: set[str] = set()
        self._store = StoreStats()
        self._leases = LeaseStats()
        self._totals: Counter[str] = Counter()

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
        metrics.merged_steps.inc(stats.merged)
        metrics.preemptions.inc(self._new("preempted", stats.preempted))
        metrics.adapter_lookups.labels("slot", "hit").inc(self._new("slot_hits", stats.slot_hits))
        metrics.adapter_lookups.labels("slot", "miss").inc(self._new("slot_misses", stats.slot_misses))
        metrics.adapter_evictions.labels("slot").inc(self._new("slot_evictions", stats.slot_evictions))
        for seconds in stats.slot_loads:
            metrics.adapter_load_seconds.labels("slot").observe(seconds)

    def row(self, key: AdapterKey | None, completion: Completion) -> None:
        """A row left the engine, well or not."""
        name = BASE if key is None else self._label(key.name)
        self._metrics.adapter_rows.labels(name).inc()
        self._metrics.adapter_tokens.labels(name, "prompt").inc(completion.prompt_tokens)
        self._metrics.adapter_tokens.labels(name, "generated").inc(len(completion.token_ids))

    def store(self, stats: StoreStats) -> None:
        metrics, before, self._store = self._metrics, self._store, stats
        metrics.adapters_resident.labels("host").set(stats.resident)
        metrics.adapters_pinned.set(stats.pinned)
        metrics.adapters_host_bytes.set(stats.num_bytes)
        metrics.adapter_lookups.labels("host", "hit").inc(stats.hits - before.hits)
        metrics.adapter_lookups.labels("host", "miss").inc(stats.misses - before.misses)
        metrics.adapter_evictions.labels("host").inc(stats.evictions - before.evictions)
        for kind, count in stats.failures.items():
            metrics.adapters_refused.labels(kind).inc(count - before.failures.get(kind, 0))
        for seconds in stats.load_seconds:
            metrics.adapter_load_seconds.labels("host").observe(seconds)

    def handler(self, restarts: int) -> None:
        self._metrics.handler_restarts.inc(self._new("handler_restarts", restarts))

    def waiting(self, for_upload: int, for_room: int) -> None:
        self._metrics.rows_waiting.labels("upload").set(for_upload)
        self._metrics.rows_waiting.labels("room").set(for_room)

    def leases(self, stats: LeaseStats, lag_seconds: float) -> None:
        metrics, before, self._leases = self._metrics, self._leases, stats
        metrics.leases_lost.inc(stats.lost - before.lost)
        metrics.heartbeat_failures.inc(stats.extend_failures - before.extend_failures)
        metrics.heartbeat_lag.set(lag_seconds)

    def _new(self, name: str, total: int) -> int:
        """What has come to a running total since it was asked last."""
        before, self._totals[name] = self._totals[name], total
        return total - before

    def _label(self, name: str) -> str:
        if name not in self._names and len(self._names) >= self._max_adapters:
            return OTHERS
        self._names.add(name)
        return name
