"""What adapters do to modules beside adding to them."""
