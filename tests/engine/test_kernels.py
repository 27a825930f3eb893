"""The Triton kernels where there is no GPU: run by Triton's interpreter, and compiled for GPUs elsewhere.

What they promise is in `test_kernels_gpu.py`, and in `interpreted_executor.py` what the engine makes of them.
The interpreter gets a process of its own, as Triton decides between it and the compiler when it is imported.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VERSION = tuple(map(int, version("triton").split(".")[:2])) if find_spec("triton") else (0, 0)
needs_triton = pytest.mark.skipif(
    not VERSION[0], reason="Triton is not installed; it has wheels for Linux only"
)


@pytest.mark.skipif((0, 0) < VERSION < (3, 7), reason="this Triton's interpreter fails on NumPy 2.4")
@needs_triton
def test_kernels_keep_their_promises_in_the_interpreter():
    here = Path(__file__)
    promises = [str(here.with_name(name)) for name in ("test_kernels_gpu.py", "interpreted_executor.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *promises]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# Compiling: what a kernel is launched with is recorded, and compiled as Triton would for that GPU.

A100, H100 = 80, 90
SHARED_MEMORY = 99 * 1024
"""What one thread block may have on every GPU of compute capability 8.0 or more."""
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel, notes what it is launched with, and launches nothing."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches = []

    def __getitem__(self, grid):
        assert all(0 < size < 65536 for size in grid[1:])
        return lambda *args, **keywords: self.launches.append((args, keywords))

    def compile(self, capability):
        """The launches, compiled. Numbers and addresses are taken to be multiples of 16, as Triton does."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        for args, keywords in self.launches:
            options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
            names = self.kernel.arg_names
            given = dict(zip(names, args, strict=False)) | keywords
            signature, constants, attributes = {}, {}, {}
            for number, name in enumerate(names):
                value = given[name]
                if name in keywords:
                    signature[name], constants[name] = "constexpr", value
                elif isinstance(value, float):
                    signature[name] = "fp32"
                else:
                    signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
                    if isinstance(value, torch.Tensor) or value % 16 == 0:
                        attributes[number,] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constants, attributes)
            yield triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Call it with a module, the names of its kernels, and what launches them -> the compiled kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")

    def compiled(module, names, launch, capability):
        recorders = [Recorder(getattr(module, name)) for name in names]
        for name, recorder in zip(names, recorders, strict=True):
            monkeypatch.setattr(module, name, recorder)
        launch()
        return [kernel for recorder in recorders for kernel in recorder.compile(capability)]

    return compiled


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("max_tokens", "capability"), [(64, A100), (4096, H100)])
def test_lora_compiles_to_wide_loads_within_shared_memory(compiled, max_tokens, capability):
    from worker.engine.kernels import lora

    table = lora.LoRATable(32, 4096, [4096, 1024, 1024], max_rank=64, dtype=torch.bfloat16, device="cpu")
    tokens = lora.tile_tokens([(3, 0, 7)], max_tokens, 32)
    x, y = (torch.zeros(7, size, dtype=torch.bfloat16) for size in (4096, 6144))
    scratch = torch.zeros(lora.scratch_size(table, max_tokens, torch.bfloat16))
    kernels = compiled(
        lora, ["_shrink", "_expand"], lambda: lora.add_lora(x, y, table, tokens, scratch), capability
    )
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"], "weights are not read 16 bytes at a time"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap", "capability"),
    [(32, 8, 128, None, None, H100), (8, 4, 256, 4096, 50.0, A100)],
    ids=["llama-H100", "gemma2-A100"],
)
def test_attention_compiles_to_wide_loads_within_shared_memory(
    compiled, heads, kv_heads, dim, window, softcap, capability
):
    from worker.engine.kernels import attention

    query = torch.zeros(4, heads, dim, dtype=torch.bfloat16)
    cache = torch.zeros(2, 16, kv_heads, dim, dtype=torch.bfloat16)
    table, numbers = torch.zeros(4, 512, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    keywords = {"scale": 0.1, "softcap": softcap, "window": window, "out": torch.zeros_like(query)}

    def launch():
        attention.paged_decode(query, cache, cache, table, numbers[:4], **keywords)
        attention.paged_prefill(query, cache, cache, table, numbers, numbers[:4], **keywords)

    decode, merge, prefill = compiled(attention, ["_decode", "_merge", "_prefill"], launch, capability)
    for kernel in (decode, merge, prefill):
        assert kernel.metadata.shared <= SHARED_MEMORY
    for kernel in (decode, prefill):
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"], "keys are not read 16 bytes at a time"
