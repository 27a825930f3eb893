"""Which receipts are good: the rules of SQS that moto does not keep."""

import math
import time
from collections.abc import Callable


class Receipts:
    """A receipt belongs to one receive of one message, and the next receive of that message makes it stale.

    Once the visibility has ended nobody can change it until the next receive. `clock` is monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._message_of: dict[str, str] = {}
        self._latest: dict[str, str] = {}
        self._hidden_until: dict[str, float] = {}

    def received(self, message: str, receipt: str, seconds: float | None) -> None:
        """A receive brought `message`, hidden for `seconds`, or for as long as nobody knows."""
        self._message_of[receipt] = message
        self._latest[message] = receipt
        self.changed(receipt, math.inf if seconds is None else seconds)

    def changed(self, receipt: str, seconds: float) -> None:
        """The visibility was set to end in so many `seconds`. Receipts that nobody was given are no news."""
        message = self._message_of.get(receipt)
        if message is not None:
            self._hidden_until[message] = self._clock() + seconds

    def is_stale(self, receipt: str) -> bool:
        """Whether somebody has received the message since. A receipt that nobody was given is not."""
        message = self._message_of.get(receipt)
        return message is not None and self._latest[message] != receipt

    def is_over(self, receipt: str) -> bool:
        """Whether the message is visible again."""
        message = self._message_of.get(receipt)
        return message is not None and self._hidden_until[message] <= self._clock()
