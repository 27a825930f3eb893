"""What Prometheus is told. Glue turns the core's stats into these; nothing else writes to them.

Labels take their values from short fixed lists, never from jobs; the names of adapters are as many as a
setting says.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from worker.errors import AdapterInvalid

_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

OUTCOMES = ("committed", "duplicate", "split", "ignored", "failed", "dead_letter", "released", "lost")
TIERS = ("slot", "host")
BASE, OTHERS = "(base)", "(others)"
"""Values of the label `adapter` that no adapter can have for a name."""
HTTP_ROUTES = ("invocations", "predictions", "v1", "models", "workflows", "ping", "metrics", "live", "ready")
"""Values of the label `route`, beside adapters and other."""
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
        self.merged_steps = counter(
            "loramill_merged_steps", "Steps whose rows had one adapter, merged into the base model's weights."
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
            "loramill_adapters_resident", f"Adapters in memory by tier: {', '.join(TIERS)}.", "tier"
        )
        self.adapters_pinned = gauge("loramill_adapters_pinned", "Adapters that may not leave host memory.")
        self.adapters_host_bytes = gauge(
            "loramill_adapters_host_bytes", "Bytes of the adapters in host memory."
        )
        self.adapter_lookups = counter(
            "loramill_adapter_lookups",
            "Rows that asked a tier for their adapter: hit, or miss.",
            "tier",
            "result",
        )
        self.adapter_load_seconds = Histogram(
            "loramill_adapter_load_seconds",
            "Bringing an adapter into a tier: from disk to host memory, checked; from there into a slot.",
            ["tier"],
            buckets=_LOAD_SECONDS,
            registry=registry,
        )
        self.adapter_evictions = counter(
            "loramill_adapter_evictions", "Adapters that had to leave a tier for others.", "tier"
        )
        self.adapters_refused = counter(
            "loramill_adapters_refused",
            f"Adapter versions that cannot be served, by reason: {', '.join(AdapterInvalid.KINDS)}.",
            "reason",
        )
        self.adapter_rows = counter(
            "loramill_adapter_rows",
            f"Rows that the engine ended, by adapter: {BASE} without one, {OTHERS} beyond METRICS_ADAPTERS.",
            "adapter",
        )
        self.adapter_tokens = counter(
            "loramill_adapter_tokens", "Tokens of those rows, prompt and generated.", "adapter", "kind"
        )
        self.rows_waiting = gauge(
            "loramill_rows_waiting",
            "Rows that wait for their adapter: upload (it is not there yet), room (in host memory).",
            "reason",
        )
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
        self.http_requests = counter(
            "loramill_http_requests",
            f"Requests over HTTP: {', '.join(HTTP_ROUTES)}, adapters, other; 499 is a client that went away.",
            "route",
            "status",
        )
        self.http_seconds = Histogram(
            "loramill_http_seconds",
            "From a request's head to its answer.",
            ["route"],
            buckets=_HTTP_SECONDS,
            registry=registry,
        )
        self.http_rows = counter(
            "loramill_http_rows",
            "Rows of calls over HTTP, by outcome: completed, or the error's code.",
            "outcome",
        )
        self.handler_restarts = counter(
            "loramill_handler_restarts", "Processes of a custom handler that had to be started again."
        )
        self.ready = gauge("loramill_ready", "1 while the worker takes messages.")
        # A counter that is there from the start has a rate from its first event on.
        for metric, values in (
            (self.messages, OUTCOMES),
            (self.step_seconds, PHASES),
            (self.tokens, ("prompt", "generated")),
            (self.rows, ("completed",)),
            (self.http_rows, ("completed",)),
            (self.adapter_evictions, TIERS),
            (self.adapters_refused, AdapterInvalid.KINDS),
        ):
            for value in values:
                metric.labels(value)
        for tier in TIERS:
            self.adapter_load_seconds.labels(tier)
            for result in ("hit", "miss"):
                self.adapter_lookups.labels(tier, result)
