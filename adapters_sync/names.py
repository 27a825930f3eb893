"""Which adapter names, keys and files are accepted. S3 stores any key; a disk and a reader must not.

Three different answers:
  * a bad adapter name or a bad key is refused, and with it the adapter that owns it: such keys are made by
    mistake or on purpose to land elsewhere, and neither is a reason to guess;
  * a file that the mirror does not carry (pickles, code, pictures) is skipped and reported; the adapter is
    fine without it. Of code, an adapter's `model.py` is carried to workers that run it;
  * the rest is carried.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

UPLOAD_MANIFEST = "_manifest.json"
"""What `loramill push` uploads last."""
SUCCESS_MARKER = "_SUCCESS"
MODEL_PY = "model.py"
"""An adapter's own code."""
PUBLISHED_MANIFEST = "manifest.json"
"""What the mirror writes into every version; an adapter cannot bring a file of this name."""
MARKERS = frozenset({UPLOAD_MANIFEST, SUCCESS_MARKER})

MAX_DEPTH = 8
MAX_SEGMENT_BYTES = 255
"""The longest file name that ext4, XFS and APFS take."""
MAX_PATH_BYTES = 1024

PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_CARRIED = frozenset({".jinja", ".json", ".md", ".model", ".safetensors", ".tiktoken", ".txt"})
_CARRIED_NAMES = frozenset({"license", "notice", "readme"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_adapter_name(name: str) -> bool:
    """True for `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`."""
    return _NAME.fullmatch(name) is not None


def fault_in_name(name: str) -> str | None:
    """Why this cannot be an adapter's name, or None."""
    if is_adapter_name(name):
        return None
    return f"the name {shown(name)} does not match [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}"


@functools.lru_cache(maxsize=4096)  # thousands of adapters have the same few files, at every pass
def fault_in_path(path: str) -> str | None:
    """Why a path below an adapter's folder is refused, or None. Paths have `/` between segments."""
    segments = path.split("/")
    size = len(path.encode(errors="surrogatepass"))
    if size > MAX_PATH_BYTES:
        return f"the path {shown(path)} has {size} bytes; the limit is {MAX_PATH_BYTES}"
    if len(segments) > MAX_DEPTH:
        return f"the path {shown(path)} is {len(segments)} levels deep; the limit is {MAX_DEPTH}"
    for segment in segments:
        if fault := _fault_in_segment(segment):
            return f"the path {shown(path)} has {fault}"
    return None


def _fault_in_segment(segment: str) -> str | None:
    if segment == "":
        return "an empty segment"
    if segment in {".", ".."}:
        return f"a segment {segment!r}"
    if "\\" in segment:
        return "a backslash"
    if any(unicodedata.category(char) in {"Cc", "Cs"} for char in segment):
        return "a control character"
    size = len(segment.encode())
    if size > MAX_SEGMENT_BYTES:
        return f"a segment of {size} bytes; the limit is {MAX_SEGMENT_BYTES}"
    return None


@functools.lru_cache(maxsize=4096)
def why_skipped(path: str, *, code: bool = False) -> str | None:
    """Why a file with an acceptable path is not carried, or None when it is. `code` says if MODEL_PY is."""
    if path == MODEL_PY:
        return None if code else "code is carried where custom_code is on"
    name = path.rpartition("/")[2]
    stem, dot, extension = name.lower().rpartition(".")
    suffix = dot + extension if stem else ""
    if suffix in PICKLES:
        return "a pickle can run code when it is loaded"
    if path == PUBLISHED_MANIFEST:
        return "the mirror writes a file of this name itself"
    if any(segment.startswith(".") for segment in path.split("/")):
        return "hidden files are not carried"
    if suffix in _CARRIED or name.lower() in _CARRIED_NAMES:
        return None
    return "not a configuration, safetensors, tokenizer or text file"


def is_carried(path: str, *, code: bool = False) -> bool:
    """True for the path of a file that is part of an adapter's content; `code` as for `why_skipped`."""
    return path not in MARKERS and fault_in_path(path) is None and why_skipped(path, code=code) is None


def folded(text: str) -> str:
    """Equal for texts that a case-insensitive or normalising file system takes for the same name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def clash(paths: Iterable[str]) -> str | None:
    """Why these paths cannot all exist in one folder on every file system, or None."""
    files: dict[str, str] = {}
    for path in sorted(paths):
        if twin := files.get(folded(path)):
            return f"the paths {shown(twin)} and {shown(path)} differ only in case or Unicode form"
        files[folded(path)] = path
    for key, path in files.items():
        parent = key
        while parent := parent.rpartition("/")[0]:
            if parent in files:
                return f"{shown(files[parent])} is both a file and the folder of {shown(path)}"
    return None


def shown(text: str) -> str:
    """Text from outside, safe to print: quoted, escaped and at most about 100 characters."""
    return ascii(text if len(text) <= 100 else text[:97] + "...")
