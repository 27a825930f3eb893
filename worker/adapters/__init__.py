"""Adapters by name: where they are, what is known of them, and who wants them in memory."""
