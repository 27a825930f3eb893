"""lm-evaluation-harness (`lm-eval` on PyPI) over the queue, beside its own back end."""
