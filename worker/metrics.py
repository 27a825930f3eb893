"""What Prometheus is told. Glue turns the core's stats into these; nothing else writes to them.

Labels take their values from short fixed lists: no adapter names, no job ids.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

OUTCOMES = ("committed", "duplicate", "failed", "dead_letter", "released", "lost")
PHASES = ("schedule", "prepare", "forward", "sample", "update")


class Metrics:
    """The worker's metrics, registered in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self.messages = counter(
            "loramill_messages",
            f"Deliveries by their end: {', '.join(OUTCOMES)}.",
            "outcome",
        )
        self.received = counter(
            "loramill_messages_received", "Messages received, again or for the first time."
        )
        self.rows = counter(
            "loramill_rows",
            "Rows in committed results, by outcome: completed, or the error's code.",
            "outcome",
        )
        self.tokens = counter(
            "loramill_tokens", "Tokens put through the model, prompt and generated.", "kind"
        )
        self.job_seconds = Histogram(
            "loramill_job_seconds",
            "From the first look at a message to its commit.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "loramill_batch_rows", "Rows in one step of the engine.", buckets=_ROWS, registry=registry
        )
        self.batch_adapters = Histogram(
            "loramill_batch_adapters",
            "Distinct adapters in one step of the engine.",
            buckets=(0, *_ROWS),
            registry=registry,
        )
        self.step_seconds = counter(
            "loramill_step_seconds",
            f"Time in engine steps by phase: {', '.join(PHASES)}.",
            "phase",
        )
        self.prefix_reused_tokens = counter(
            "loramill_prefix_reused_tokens",
            "Prompt tokens that were not computed, since their beginning was in the KV cache.",
        )
        self.preemptions = counter(
            "loramill_preemptions", "Rows that gave their cache blocks back and were computed anew."
        )
        self.engine_rows = gauge(
            "loramill_engine_rows", "Rows in the engine by state: running, waiting.", "state"
        )
        self.rows_in_flight = gauge("loramill_rows_in_flight", "Rows of the messages that are held.")
        self.kv_blocks_free = gauge("loramill_kv_blocks_free", "Free blocks of the KV cache.")
        self.adapters_resident = gauge(
            "loramill_adapters_resident", "Adapters in memory by tier: slot, host.", "tier"
        )
        self.adapters_host_bytes = gauge(
            "loramill_adapters_host_bytes", "Bytes of the adapters in host memory."
        )
        self.adapter_loads = counter(
            "loramill_adapter_loads",
            "Requests for an adapter's weights: hit (in host memory), miss (read from disk), failed.",
            "result",
        )
        self.adapter_evictions = counter("loramill_adapter_evictions", "Adapters dropped from host memory.")
        self.leases_lost = counter(
            "loramill_leases_lost", "Messages whose visibility ended before their work."
        )
        self.heartbeat_failures = counter(
            "loramill_heartbeat_failures",
            "Extensions of a message's visibility that failed and were retried.",
        )
        self.heartbeat_lag = gauge(
            "loramill_heartbeat_lag_seconds", "How late the last heartbeat began: a blocked event loop."
        )
        self.ready = gauge("loramill_ready", "1 while the worker takes messages.")
        # A counter that is there from the start has a rate from its first event on.
        for metric, values in (
            (self.messages, OUTCOMES),
            (self.step_seconds, PHASES),
            (self.tokens, ("prompt", "generated")),
            (self.rows, ("completed",)),
            (self.adapter_loads, ("hit", "miss", "failed")),
        ):
            for value in values:
                metric.labels(value)
