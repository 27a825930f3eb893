"""Workers that are killed at any moment and see faults in every call: `python -m tests.chaos --help`."""
