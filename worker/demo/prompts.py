"""What `loramill demo` asks: every prompt once per adapter, all in one mixed batch.

The prompts are not among the questions the adapters were trained on (`train_adapters.LESSONS`).
"""

ADAPTERS: tuple[str, ...] = ("", "pirate", "robot", "json")
"""Adapter names as they stand on the wire: "" is the base model."""

DEMO_PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Give me one tip for sleeping better.",
    "What do bees make?",
    "How do I make a cup of tea?",
    "Tell me something about the moon.",
    "Why do we need water?",
    "Explain photosynthesis.",
)
"""User messages, to be put through the model's chat template."""

MAX_NEW_TOKENS = 40
"""Room for one whole answer in each style."""
