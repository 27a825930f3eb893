"""A row in whatever format it has: a line of a file, or one of a message's `inputs`."""

import msgspec

from worker.errors import InvalidLine, RowError
from worker.jobs import Given, Row
from worker.wire.bedrock_rows import read_bedrock
from worker.wire.draft import Draft
from worker.wire.native_rows import read_native
from worker.wire.openai_rows import read_openai

_READERS = {"native": read_native, "openai": read_openai, "bedrock": read_bedrock}
FORMATS = ("auto", *_READERS)

_OPENAI, _BEDROCK = {"custom_id", "method", "url", "body"}, {"recordId", "modelInput"}
_BOM = b"\xef\xbb\xbf"


def read_line(line: bytes, index: int, given: Given, format: str = "auto") -> Row:  # noqa: A002 (the field's name)
    """Read line `index` (from 0) of a file. Raises nothing: what is wrong with it is the row's `failure`.

    A row without an id is called by its index. Blank lines are no rows: leave them out before.
    """
    draft = Draft(index, str(index), given)
    try:
        try:
            item = msgspec.json.decode(line.removeprefix(_BOM) if index == 0 else line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidLine(f"the line is not JSON: {error}") from error
        return read_item(draft, item, format)
    except RecursionError:
        return draft.failed(InvalidLine("the line is nested too deeply"))
    except InvalidLine as error:
        return draft.failed(error)


def read_item(draft: Draft, item: object, format: str = "auto") -> Row:  # noqa: A002 (the field's name)
    """Read a decoded row; a mistake in it is the row's `failure`. `auto` goes by the fields that it has."""
    assert format in FORMATS
    try:
        return _READERS[format_of(item) if format == "auto" else format](draft, item)
    except RowError as error:
        return draft.failed(error)


def format_of(item: object) -> str:
    """The format that a row seems to have: that of which it has a field, else native."""
    if isinstance(item, dict):
        if not _OPENAI.isdisjoint(item):
            return "openai"
        if not _BEDROCK.isdisjoint(item):
            return "bedrock"
    return "native"
