"""The machine that a figure was measured on."""

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}


def describe() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return {
        "processor": processor(text) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "native_bf16": has_bf16(text),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def processor(cpuinfo: str) -> str | None:
    return next(iter(_values(cpuinfo, "model name")), None)


def has_bf16(cpuinfo: str) -> bool:
    """Whether the processor multiplies bfloat16 itself, by the flags that Linux lists."""
    flags = _values(cpuinfo, "flags") + _values(cpuinfo, "Features")
    return any(_BF16_FLAGS & set(line.split()) for line in flags)


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage's, this peak does not begin with that of the parent process
        return int(_values(status.read_text(), "VmHWM")[0].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _values(text: str, name: str) -> list[str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for key, _, value in pairs if key.strip() == name]
