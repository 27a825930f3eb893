"""Processes that run another module of this program."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])
_MAIN = """
import runpy, sys
root, module = sys.argv[1:3]
if root not in sys.path:
    sys.path.append(root)  # behind the standard library: it may be where packages are installed
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def child_command(module: str, *arguments: object) -> list[str]:
    """What runs `module` as `python -m` does, but never one that lies in the current folder."""
    return [sys.executable, "-P", "-c", _MAIN, _ROOT, module, *map(str, arguments)]
