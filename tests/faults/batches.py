"""A batch call to SQS, some entries of which are answered without the server."""

import random
from collections.abc import Callable
from typing import Any

from tests.faults.receipts import Receipts

_CHANGE, _DELETE = "ChangeMessageVisibilityBatch", "DeleteMessageBatch"

Entry = dict[str, Any]


class Batch:
    """The entries of one call: `left` go to the server, `answer` is what the client gets."""

    def __init__(self, operation: str, entries: list[Entry]) -> None:
        self.left = entries
        self._operation = operation
        self._successful: list[Entry] = []
        self._failed: list[Entry] = []

    @property
    def answer(self) -> dict[str, list[Entry]]:
        return {"Successful": self._successful, "Failed": self._failed}

    def refuse_stale(self, receipts: Receipts) -> None:
        """Answer for receipts that are no longer good. SQS says that a delete by such a one succeeded."""
        for entry in self._take_out(lambda one: receipts.is_stale(one.get("ReceiptHandle", ""))):
            if self._operation == _DELETE:
                self._successful.append({"Id": entry["Id"]})
            else:
                self._fail(entry["Id"], "InvalidParameterValue")
        if self._operation == _CHANGE:
            for entry in self._take_out(lambda one: receipts.is_over(one["ReceiptHandle"])):
                self._fail(entry["Id"], "MessageNotInflight")

    def shorten(self, longest_seconds: int) -> None:
        """Hide no message for longer."""
        if self._operation == _CHANGE:
            for entry in self.left:
                entry["VisibilityTimeout"] = min(entry["VisibilityTimeout"], longest_seconds)

    def fail_one(self, rng: random.Random) -> int:
        """One entry is not done; returns how many."""
        if not self.left:
            return 0
        unlucky = rng.choice(self.left)
        self._take_out(lambda one: one is unlucky)
        self._fail(unlucky["Id"], "InternalError")
        return 1

    def take(self, answer: dict[str, list[Entry]], receipts: Receipts) -> None:
        """What the server says about those that were left."""
        sent = {entry["Id"]: entry for entry in self.left}
        for done in answer.get("Successful", []):
            self._successful.append(done)
            if self._operation == _CHANGE:
                entry = sent[done["Id"]]
                receipts.changed(entry["ReceiptHandle"], entry["VisibilityTimeout"])
        self._failed += answer.get("Failed", [])
        self.left = []

    def deny_one(self, rng: random.Random) -> int:
        """One entry that was done is said to have failed; returns how many."""
        if not self._successful:
            return 0
        denied = self._successful.pop(rng.randrange(len(self._successful)))
        self._fail(denied["Id"], "InternalError")
        return 1

    def _take_out(self, which: Callable[[Entry], bool]) -> list[Entry]:
        taken = [entry for entry in self.left if which(entry)]
        self.left = [entry for entry in self.left if not which(entry)]
        return taken

    def _fail(self, entry_id: str, code: str) -> None:
        self._failed.append({"Id": entry_id, "Code": code, "SenderFault": code != "InternalError"})
