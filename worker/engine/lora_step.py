"""How one step applies LoRA: the same for every projection, built once, dropped after it."""

from collections.abc import Mapping, Sequence

import torch

from worker.engine.lora_ops import Lanes, foreign_ranks
from worker.engine.lora_plan import Run, lane_places


class PackedTokens:
    """The tokens that go through all of `slots` side by side."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        """`runs` follow each other without a gap."""
        self.slots = tuple(sorted({slot for slot, _, _ in runs}))
        self.tokens = slice(runs[0][1], runs[-1][2])
        own = [slot for slot, start, stop in runs for _ in range(start, stop)]
        self._token_slots = torch.tensor(own, device=device)
        self._foreign: dict[tuple[int, ...], torch.Tensor] = {}

    def foreign(self, slots: tuple[int, ...]) -> torch.Tensor:
        """See `foreign_ranks`; projections with the same ranks share it."""
        mask = self._foreign.get(slots)
        if mask is None:
            mask = self._foreign[slots] = foreign_ranks(self._token_slots, slots)
        return mask


class LoRAStep:
    """Which tokens go which way: `segments`, then `packed`, then `lanes` by the rank of their bank."""

    def __init__(
        self,
        segments: Sequence[Run] = (),
        packed: PackedTokens | None = None,
        lanes: Mapping[int, Lanes] | None = None,
    ) -> None:
        self.segments = segments
        self.packed = packed
        self.lanes = lanes or {}


def stand_in_lanes(runs: Sequence[Run], lanes: Mapping[int, int], device: torch.device) -> Lanes:
    """Places for the tokens of `runs`, which follow each other without a gap; `lanes` by slot."""
    count = max(lanes[slot] for slot, _, _ in runs) + 1
    depth = max(stop - start for _, start, stop in runs)
    first = runs[0][1]
    places = lane_places(runs, lanes, depth)
    source = [first] * (count * depth)
    for token, place in enumerate(places, first):
        source[place] = token
    return Lanes(
        count,
        depth,
        slice(first, runs[-1][2]),
        torch.tensor(source, device=device),
        torch.tensor(places, device=device),
    )
