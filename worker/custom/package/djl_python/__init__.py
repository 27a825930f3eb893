"""What a handler gets by `from djl_python import Input, Output`: DJL Serving's names, with its meaning.

Nothing here imports the rest of the worker: it runs in the handler's own process.
"""

from worker.custom.package.djl_python.inputs import Input
from worker.custom.package.djl_python.outputs import Output
from worker.custom.package.djl_python.pair_list import PairList

__all__ = ["Input", "Output", "PairList"]
