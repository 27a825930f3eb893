"""What is to be scored: a row's input and target -> tokens, as lm-evaluation-harness makes them.

Its `loglikelihood` and `loglikelihood_rolling` are the reference (lm_eval/models/huggingface.py), so that a
number here is the number there.
"""

from collections.abc import Callable
from typing import NamedTuple

from worker.engine.tokenizer import Tokenizer
from worker.errors import InvalidLine
from worker.jobs import Row

Encode = Callable[[str], tuple[int, ...]]


class Pair(NamedTuple):
    """A context and what is scored after it."""

    tokens: tuple[int, ...]
    """Of both, two at least."""
    num_targets: int
    """How many of them, from the last backwards, are scored: at least one, and not the first."""


def read_pair(tokenizer: Tokenizer, row: Row) -> Pair:
    """What `row`, of task score, asks for: its target, or without one all of its input but the first token.

    Spaces at the end of the context belong to the target. Nothing comes before a target without a context,
    so the BOS token does, or where the tokenizer has none the EOS token. Raises InvalidLine when nothing is
    left to be scored.
    """
    if row.tokens is not None:
        assert not isinstance(row.target, str)
        pair = _whole(row.tokens) if row.target is None else _join(tokenizer, row.tokens, row.target)
    else:
        assert not isinstance(row.target, tuple)
        context, encode = _context(tokenizer, row)
        if row.target is None:
            pair = _whole(encode(context))
        else:
            pair = _split(tokenizer, encode, context, row.target)
    if pair.num_targets < 1:
        empty = (
            "target has no tokens of its own" if row.target is not None else "input has fewer than two tokens"
        )
        raise InvalidLine(f"The row's {empty}: there is nothing to score")
    return pair


def _context(tokenizer: Tokenizer, row: Row) -> tuple[str, Encode]:
    """The text before the target, and how it is encoded."""
    if row.messages is not None:
        return tokenizer.render_chat(row.messages), tokenizer.encode_chat
    assert row.text is not None
    return row.text, tokenizer.encode


def _whole(tokens: tuple[int, ...]) -> Pair:
    return Pair(tokens, len(tokens) - 1)


def _join(tokenizer: Tokenizer, context: tuple[int, ...], target: tuple[int, ...]) -> Pair:
    """`target` after `context`, or after the token that stands for an empty one."""
    if context:
        return Pair(context + target, len(target))
    first = tokenizer.first_token
    # A target that begins with that token is not given it twice.
    return _whole(target) if target[:1] == (first,) else Pair((first, *target), len(target))


def _split(tokenizer: Tokenizer, encode: Encode, context: str, target: str) -> Pair:
    """The text is encoded as a whole: what comes after as many tokens as the context has is the target."""
    bare = context.rstrip()
    target = context[len(bare) :] + target
    before = encode(bare)
    return _join(tokenizer, before, encode(bare + target)[len(before) :])
