"""DJL Serving's `accumulate` handler, transcribed: adds up the arrays that it was ever sent."""

import logging

import numpy as np
from djl_python import Input
from djl_python import Output
from djl_python.np_util import from_nd_list, to_nd_list


class Accumulation(object):
    def __init__(self):
        self.nd = np.zeros(1, dtype="float32")
        self.initialized = False

    def initialize(self, properties: dict):
        self.initialized = True

    def accumulate(self, inputs):
        try:
            data = inputs.get_as_numpy()
            self.nd = self.nd + data[0]
            outputs = Output()
            if inputs.contains_key("npz"):
                outputs.add_as_npz([self.nd])
            else:
                outputs.add_as_numpy([self.nd])
            assert (from_nd_list(to_nd_list([self.nd]))[0] == self.nd).all()
        except Exception as e:
            logging.exception("accumulate failed")
            outputs = Output().error(str(e))
        return outputs


_service = Accumulation()


def handle(inputs: Input):
    if not _service.initialized:
        _service.initialize(inputs.get_properties())
    if inputs.is_empty():
        return None
    return _service.accumulate(inputs)
