"""The machine that a figure was measured on."""

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    import torch  # not with the module: a side times its imports

    from worker.engine.products import has_bfloat16

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return {
        "processor": processor(text) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "native_bf16": has_bfloat16(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def processor(cpuinfo: str) -> str | None:
    return next(iter(_values(cpuinfo, "model name")), None)


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage's, this peak does not begin with that of the parent process
        return int(_values(status.read_text(), "VmHWM")[0].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib(process: int | str = "self") -> float:
    """Memory of a process that is resident now, MiB. Linux only."""
    return int(_values(Path(f"/proc/{process}/status").read_text(), "VmRSS")[0].split()[0]) / 1024


def _values(text: str, name: str) -> list[str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for key, _, value in pairs if key.strip() == name]
