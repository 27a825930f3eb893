"""Names for calls of the model and its adapters, one after the other."""
