"""The query of a request, read strictly: nothing is guessed and nothing is dropped."""

import re
from urllib.parse import parse_qsl

from worker.http.answers import Refused
from worker.wire.checks import BOOLEANS

_MOST = 100
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


class Parameters:
    """Each `take` removes what it reads; what is left in the end is an option, or a mistake."""

    def __init__(self, raw_query: str) -> None:
        """Raises Refused for a query that cannot be read, or names a parameter twice."""
        try:
            pairs = parse_qsl(raw_query, keep_blank_values=True, errors="strict", max_num_fields=_MOST)
        except UnicodeDecodeError as error:
            raise Refused(400, "The query is not UTF-8") from error
        except ValueError as error:
            raise Refused(400, f"The query has more than {_MOST} parameters") from error
        self._left: dict[str, str] = {}
        for name, value in pairs:
            if name in self._left:
                raise Refused(400, f"The parameter {name} is given twice")
            self._left[name] = value

    def take(self, name: str) -> str | None:
        return self._left.pop(name, None)

    def required(self, name: str) -> str:
        """Raises Refused when it is absent or empty."""
        value = self.take(name)
        if not value:
            raise Refused(400, f"The parameter {name} is required")
        return value

    def boolean(self, name: str) -> bool | None:
        """None when it is absent."""
        value = self.take(name)
        if value is None:
            return None
        if value.lower() not in BOOLEANS:
            raise Refused(400, f"The parameter {name} is {value!r}; it must be true or false (1, 0, yes, no)")
        return BOOLEANS[value.lower()]

    def number(self, name: str, default: int, *, least: int, most: int | None = None) -> int:
        value = self.take(name)
        if value is None:
            return default
        number = int(value) if _NUMBER.fullmatch(value) else -1
        if number < least or (most is not None and number > most):
            limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise Refused(400, f"The parameter {name} is {value!r}; it must be a whole number {limits}")
        return number

    def rest(self) -> dict[str, str]:
        """All that was not taken."""
        left, self._left = self._left, {}
        return left

    def end(self) -> None:
        """Raises Refused when something is left."""
        if self._left:
            raise Refused(400, f"The parameter {next(iter(self._left))} is not known here")
