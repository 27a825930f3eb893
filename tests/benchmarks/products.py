"""What packing a weight gains: the product of `worker.engine.products` beside torch's plain one.

    python -m tests.benchmarks.products [--dtype float32] [--threads N]

For the shapes of the demo's model, q/k/v and gate/up fused as the engine fuses them. Each figure is the best
of several tries, the two sides taking turns.
"""

import argparse
import math
import time

import torch
from torch.nn import functional

from worker.engine.products import make_product

SHAPES = {
    "q, k, v": (960, 576),
    "o": (576, 576),
    "gate, up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
ROWS = (1, 4, 16, 32, 128, 512)
_COPIES = 8
"""Of each weight, so that none of them stays in a cache from one use to the next."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{args.dtype}, {torch.get_num_threads()} threads: times as fast as the plain product (GFLOP/s)")
    print(f"{'':<10}" + "".join(f"{f'{rows} rows':>16}" for rows in ROWS))
    for name, (out_features, in_features) in SHAPES.items():
        copies = 1 if name == "head" else _COPIES
        weights = [
            torch.randn(out_features, in_features).to(getattr(torch, args.dtype)) for _ in range(copies)
        ]
        packed = [make_product(weight, None)[0] for weight in weights]
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, in_features).to(weights[0].dtype)
            ours, plain = math.inf, math.inf
            for _ in range(7):
                started = time.perf_counter()
                for product in packed:
                    product(x)
                middle = time.perf_counter()
                for weight in weights:
                    functional.linear(x, weight)
                ours = min(ours, middle - started)
                plain = min(plain, time.perf_counter() - middle)
            flops = 2 * rows * out_features * in_features * copies / ours / 1e9
            cells.append(f"{f'{plain / ours:.2f} ({flops:.0f})':>16}")
        print(f"{name:<10}" + "".join(cells), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
