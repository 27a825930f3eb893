"""A row while it is read, whatever format it has."""

from typing import Any

from adapters_sync.layout import is_adapter_name
from worker.errors import AdapterNotFound, InvalidLine, RowError
from worker.jobs import Given, Origin, Raw, Row
from worker.wire.checks import failure_of, show

_MAX_NAME_SHOWN = 128


class Draft:
    """What is known of a row before the first mistake, so that it stays with the failed row."""

    def __init__(self, index: int, default_id: str, given: Given) -> None:
        self.index = index
        self.id = default_id
        self.id_is_sound = True
        self.given = given
        self.adapter: str | None = None
        self.workflow = given.workflow
        self.origin: Origin | None = None
        self.raw: Raw | None = None

    def read_id(self, value: object, field: str, *, required: bool = False) -> None:
        """Take the row's own id; null counts as absent. Raises InvalidLine."""
        if value is None and not required:
            return
        if not isinstance(value, str) or not value:
            self.id_is_sound = False
            raise InvalidLine(f"the row's {field} is {show(value)}; it must be text that is not empty")
        self.id = value

    def read_adapter(self, value: object, field: str = "adapter") -> None:
        """Take the adapter that the row names, unless the job's override wins; "" is the base model.

        Raises InvalidLine when it is no text, AdapterNotFound when no adapter can have that name.
        """
        said = value if self.given.override is None else self.given.override
        if self.workflow is not None:
            if said:
                raise InvalidLine(
                    f"the row's {field} is {show(said)}; the workflow {self.workflow} has adapters of its own"
                )
            return
        if said is not None and not isinstance(said, str):
            raise InvalidLine(f"the row's {field} is {show(said)}; it must be text")
        self.adapter = said or None
        if self.adapter is not None and not is_adapter_name(self.adapter):
            shown, self.adapter = show(self.adapter), self.adapter[:_MAX_NAME_SHOWN]
            raise AdapterNotFound(f"Adapter {shown} is not registered: no adapter can have that name")

    def done(self, **fields: Any) -> Row:
        """The row, with what its format has read of it."""
        return Row(
            index=self.index,
            id=self.id,
            adapter=self.adapter,
            workflow=self.workflow,
            task=self.given.task,
            origin=self.origin,
            raw=self.raw,
            **fields,
        )

    def failed(self, error: RowError) -> Row:
        return self.done(failure=failure_of(error))
