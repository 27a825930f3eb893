"""What each way of LoRA takes in a decode step, beside what the engine's rule expects of it.

    python -m tests.benchmarks.lora_ways [--rows 16] [--rank 8] [--measured]

The projections are those of the demo's model, thirty layers of them, without the base products. A star marks
the way that the rule chose. With --measured the rule goes by costs measured now rather than its defaults.
"""

import argparse
import math
import time

import torch
from torch import nn

from worker.engine import lora_layers
from worker.engine.adapters.adapter import LoRAPair, LoRAWeights
from worker.engine.lora_layers import LoRALayers, measure_costs
from worker.engine.lora_plan import Costs, Way
from worker.engine.projections import Projection
from worker.jobs import AdapterKey

GROUPS = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))
LAYERS = 30


class Model:
    """Projections whose own product costs nothing: only what LoRA adds is timed."""

    def __init__(self, costs: Costs) -> None:
        self.projections = {}
        for layer in range(LAYERS):
            for group, (in_features, sizes) in enumerate(GROUPS):
                modules = [nn.Linear(in_features, size, bias=False, device="meta") for size in sizes]
                names = tuple(f"{layer}.{group}.{index}" for index in range(len(sizes)))
                self.projections[names] = Empty(modules)
        self.layers = LoRALayers(self.projections, 32, costs)

    def adapter(self, rank: int) -> LoRAWeights:
        pairs = {}
        for names, projection in self.projections.items():
            for name, size in zip(names, projection.sizes, strict=True):
                a, b = torch.randn(rank, projection.in_features), torch.randn(size, rank)
                pairs[name] = LoRAPair(a, b)
        return LoRAWeights(AdapterKey("adapter", "1"), pairs)


class Empty(Projection):
    def __init__(self, modules: list[nn.Linear]) -> None:
        self.in_features = modules[0].in_features
        self.sizes = [module.out_features for module in modules]
        self.addition = None


def seconds_of(model: Model, spans: list[tuple[int, int]], way: Way | None) -> tuple[float, Way]:
    """The best of several tries; `way` None takes what the rule chooses."""
    chosen = []

    def choose(*given: object) -> Way:
        chosen.append(rule(*given) if way is None else way)
        return chosen[-1]

    rule, lora_layers.cheapest = lora_layers.cheapest, choose
    try:
        step = model.layers.plan(spans)
    finally:
        lora_layers.cheapest = rule
    tensors = [
        (
            projection,
            torch.randn(len(spans), projection.in_features),
            torch.zeros(len(spans), sum(projection.sizes)),
        )
        for projection in model.projections.values()
    ]
    best = math.inf
    model.layers.step = step
    for _ in range(8):
        started = time.perf_counter()
        for projection, x, y in tensors:
            projection.addition(x, y)
        best = min(best, time.perf_counter() - started)
    model.layers.step = None
    return best, chosen[-1] if chosen else Way.SEGMENTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--measured", action="store_true")
    args = parser.parse_args()
    costs = measure_costs(torch.float32) if args.measured else Costs()
    print(f"{args.rows} rows, rank {args.rank}, {torch.get_num_threads()} threads, {costs}")
    print(
        f"{'adapters':>8}"
        + "".join(f"{f'{way.value} ms':>14}" for way in Way)
        + f"{'rule':>12}{'worse by':>10}"
    )
    model = Model(costs)
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if count > args.rows:
            break
        for slot in range(count):
            if slot not in model.layers._entries:
                model.layers.put(slot, model.adapter(args.rank))
        spans = sorted((row % count, 1) for row in range(args.rows))
        times = {way: seconds_of(model, spans, way)[0] for way in Way}
        _, chosen = seconds_of(model, spans, None)
        worse = times[chosen] / min(times.values()) - 1
        cells = "".join(f"{1e3 * times[way]:>13.1f}{'*' if way is chosen else ' '}" for way in Way)
        print(f"{count:>8}{cells}{chosen.value:>12}{worse:>9.0%}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
