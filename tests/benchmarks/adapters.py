"""Random adapters, written as PEFT would save them but without a model around them: 32 take a second."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.benchmarks.workload import TARGETS, Settings

STD = 0.02
"""Of A and of B: enough for every row to say something else than the base model."""


def write_adapters(folder: Path, settings: Settings) -> list[Path]:
    """Folders `adapter0`, `adapter1`, ... below `folder`, float32."""
    modules = TARGETS[settings.targets]
    shapes = linear_shapes(settings.base, modules)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base.name,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    made = []
    for number in range(settings.adapters):
        own = folder / f"adapter{number}"
        own.mkdir()
        (own / "adapter_config.json").write_text(json.dumps(config))
        rng = np.random.default_rng([settings.seed, number])
        tensors = {}
        for name, (out_features, in_features) in shapes.items():
            for side, shape in (("A", (settings.rank, in_features)), ("B", (out_features, settings.rank))):
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(STD)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        made.append(own)
    return made


def linear_shapes(base: Path, modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module of these names in the base model's weights, by full name.

    Raises ValueError when one of the names is not there.
    """
    shapes = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removesuffix(".weight")
                if key != name and name.rpartition(".")[2] in modules:
                    out_features, in_features = file.get_slice(key).get_shape()
                    shapes[name] = (out_features, in_features)
    missing = set(modules) - {name.rpartition(".")[2] for name in shapes}
    if missing:
        raise ValueError(f"the base model in {base} has no {', '.join(sorted(missing))}")
    return shapes
