"""DJL Serving's `adaptecho` handler, transcribed: echoes with the adapter's name and option before it."""

from djl_python import Input
from djl_python import Output

adapters = dict()


def _refuse(inputs, what):
    name = inputs.get_property("name")
    if inputs.contains_key("error"):
        raise ValueError(f"Failed to {what} adapter: {name}")
    if inputs.contains_key("oom"):
        raise MemoryError


def register_adapter(inputs: Input):
    global adapters
    name = inputs.get_property("name")
    _refuse(inputs, "register")
    adapters[name] = inputs
    return Output(message=f"Adapter {name} registered")


def update_adapter(inputs: Input):
    global adapters
    name = inputs.get_property("name")
    if name not in adapters:
        raise ValueError(f"Adapter {name} not registered.")
    _refuse(inputs, "update")
    adapters[name] = inputs
    return Output(message=f"Adapter {name} updated")


def unregister_adapter(inputs: Input):
    global adapters
    name = inputs.get_property("name")
    if name not in adapters:
        raise ValueError(f"Adapter {name} not registered.")
    del adapters[name]
    return Output(message=f"Adapter {name} unregistered")


def handle(inputs: Input):
    if inputs.is_empty():
        return

    outputs = Output()
    for i, input in enumerate(inputs.get_batches()):
        data = input.get_as_string()
        if input.contains_key("adapter"):
            name = input.get_as_string("adapter")
            if name in adapters:
                option = ""
                if adapters[name].contains_key("echooption"):
                    option = adapters[name].get_as_string("echooption")
                out = name + option + data
            else:
                out = "dyn" + name + data
        else:
            out = data
        outputs.add(out, key="data", batch_index=i)
    return outputs
