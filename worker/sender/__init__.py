"""The sender's side of jobs."""
