"""A handler that does whatever its request says, all of it badly."""

import json
import os
import signal
import sys
import time

from djl_python import Input, Output, PairList
from helper import WORDS

began = {}


class Odd:
    def __str__(self):
        return "odd"


def handle(inputs: Input):
    if inputs.is_empty():
        began.update(inputs.get_properties())
        print("began on stdout")
        print("began on stderr", file=sys.stderr)
        return None
    how = inputs.get_as_string("how") if inputs.contains_key("how") else inputs.get_as_json()["inputs"]
    return globals()[how](inputs) if how in globals() else Output().add(how.upper())


def register_adapter(inputs: Input):
    if inputs.contains_key("kill"):
        os.kill(os.getpid(), signal.SIGKILL)


def nothing(inputs):
    return None


def crash(inputs):
    os.kill(os.getpid(), signal.SIGSEGV)


def loop(inputs):
    while True:
        pass


def leave(inputs):
    os._exit(7)


def starve(inputs):
    return bytearray(1 << 62)


def huge(inputs):
    return Output().add(bytearray(129 << 20))


def endless(inputs):
    def pieces():
        while True:
            yield b"x" * (1 << 20)

    return Output().add_stream_content(pieces(), None)


def broken_stream(inputs):
    def pieces():
        yield "one"
        raise ValueError("no two")

    return Output().add_stream_content(pieces(), None)


def token_stream(inputs):
    return Output().add_stream_content(iter(["a", "b"]))


def bad_code(inputs):
    return Output(code="two hundred")


def teapot(inputs):
    return Output(code=418, message="short and\r\nstout").add_property("X-Kind", Odd()).add_as_json({"tea": 1})


def bad_header(inputs):
    return Output().add_property("a b", "c").add_property("X-Split", "a\r\nSet-Cookie: b").add("fine")


def twice(inputs):
    return Output().add_property("Content-Type", "text/plain").error("why", code=404)


def no_json(inputs):
    return Output().add({"value": Odd()})


def nonsense(inputs):
    """Write to every file that is open, of which one is the line to the worker."""
    for number in range(3, 64):
        try:
            os.write(number, b"\x00\x00\x00\x05hello")
        except OSError:
            pass
    return Output().add("wrote")


def ready(inputs):
    return Output().add_as_json({
        "began": {key: str(value) for key, value in began.items()},
        "properties": {key: str(value) for key, value in inputs.get_properties().items()},
        "here": os.getcwd(),
        "beside": WORDS,
        "secrets": [name for name in os.environ if name.startswith("LORAMILL_")],
        "cause": PairList(pair_map={"a": 1}).get("a"),
    })


def binary(inputs):
    return Output().add(b"\xff\xfe")


def generated(inputs):
    return Output().add_as_json([{"generated_text": "well said"}])


async def later(inputs):
    return Output().add("later")


def slow(inputs):
    time.sleep(0.3)
    return Output().add(json.dumps({"slept": True}))
