"""`python -m adapters_sync sync`, `push` and `adapters`: what `loramill` has under the same names."""

from adapters_sync.cli import app

app(prog_name="adapters_sync")
