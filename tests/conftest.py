"""Settings of the whole suite."""

import os

# Tiny models gain nothing from threads, and lose much when the cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing here may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
