"""DJL Serving's `async_echo` handler, transcribed without its pauses; `how` is ours."""

import json

from djl_python import Input, Output
from djl_python.encode_decode import decode

TOKENS = ["unit", "testing", "async", "mode", "[DONE]"]


async def tokens(text):
    for token in (f"{text} {TOKENS[0]}", *TOKENS[1:]):
        yield json.dumps({"token": token})


async def pieces(response, properties):
    async for chunk in response:
        output = Output()
        for key, value in properties.items():
            output.add_property(key, value)
        output.add(Output.binary_encode({"data": chunk, "last": "[DONE]" in chunk}))
        yield output


async def odd(how):
    if how == "fails":
        yield Output().add(Output.binary_encode({"data": "", "last": True, "code": 400, "error": "no way"}))
        return
    if how == "nothing":
        return
    yield Output().add("plain ")
    if how == "breaks":
        yield Output().add(Output.binary_encode({"data": "", "last": True, "code": 424, "error": "no two"}))
    if how == "raises":
        raise ValueError("no two")
    if how == "wrong":
        yield "text"
    yield Output().add("text")
    if how == "endless":
        while True:
            yield Output().add(Output.binary_encode({"data": ".", "last": True}))


async def handle(inputs: Input):
    if inputs.is_empty():
        return None
    if inputs.contains_key("how"):
        return odd(inputs.get_as_string("how"))
    first = inputs.get_batches()[0]
    payload = decode(first, first.get_property("Content-Type"))
    text = payload.pop("inputs")
    if payload.pop("stream", "false").lower() == "true":
        return pieces(tokens(text), {"X-Mine": "1"})
    said = json.dumps({"generated_text": f"{text} {' '.join(TOKENS[:4])}"})
    return Output().add_property("X-Mine", "1").add(Output.binary_encode({"data": said, "last": True}))
