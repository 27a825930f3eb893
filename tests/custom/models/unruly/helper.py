"""What a handler imports from beside it."""

WORDS = "from beside"
