"""How likely given tokens are, of all rows of a step, and its way from the device to the host."""

from collections.abc import Sequence as SequenceOf

import torch

from worker.engine.log_probs import score_targets
from worker.engine.sequence import Scored
from worker.engine.transfer import to_device


class Scores:
    """Take rows in by `add`, then `fetch` once; `collect` waits. Nothing else waits for the device."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._found: list[torch.Tensor] = []
        self._fetched: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def add(self, key: int, logits: torch.Tensor, targets: SequenceOf[int]) -> None:
        """Score `targets` of row `key`, the i-th by logits [targets, vocabulary]."""
        self._counts[key] = len(targets)
        log_probs, likeliest = score_targets(logits, to_device(torch.tensor(targets), logits.device))
        self._found.append(torch.stack((log_probs, likeliest.to(torch.float32))))

    def fetch(self) -> None:
        """Start the copy to the host, on the current stream."""
        if not self._found:
            return
        found = torch.cat(self._found, dim=1)
        self._found = []
        self._fetched = found.to("cpu", non_blocking=True)
        if found.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def collect(self) -> dict[int, list[Scored]]:
        """The scores of each row, by its key."""
        if self._fetched is None:
            return {}
        if self._arrived is not None:
            self._arrived.synchronize()
        log_probs, likeliest = self._fetched.tolist()
        scores, start = {}, 0
        for key, count in self._counts.items():
            own = slice(start, start + count)
            scores[key] = [
                Scored(one, bool(top)) for one, top in zip(log_probs[own], likeliest[own], strict=True)
            ]
            start += count
        return scores
