"""A folder with an adapter -> its checked weights and its tokenizer."""
