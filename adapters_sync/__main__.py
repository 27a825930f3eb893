"""`python -m adapters_sync sync` and `push`: what `loramill sync` and `loramill push` are."""

from adapters_sync.cli import app

app(prog_name="adapters_sync")
