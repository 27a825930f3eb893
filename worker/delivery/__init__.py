"""A message from the queue to its committed results."""
