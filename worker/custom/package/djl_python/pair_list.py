"""Keys and values in order. A key may be there more than once, or be None."""

from collections.abc import Iterable, Mapping
from typing import Any


class PairList:
    """Two lists of one length, `keys` and `values`; a value is never None when it came by `add`."""

    def __init__(
        self,
        keys: list[Any] | None = None,
        values: list[Any] | None = None,
        pair_list: Iterable[tuple[Any, Any]] | None = None,
        pair_map: Mapping[Any, Any] | None = None,
    ) -> None:
        if keys and values:
            if len(keys) != len(values):
                raise ValueError(f"{len(keys)} keys and {len(values)} values; there must be as many")
            self.keys, self.values = keys, values
            return
        pairs = list(pair_list or (pair_map or {}).items())
        self.keys = [key for key, _ in pairs]
        self.values = [value for _, value in pairs]

    def add(
        self,
        key: Any = None,
        value: Any = None,
        index: int | None = None,
        pair: tuple[Any, Any] | None = None,
    ) -> None:
        """Put a pair at the end, or at `index`; a value of None is not put anywhere."""
        if index is not None and value is not None:
            self.keys.insert(index, key)
            self.values.insert(index, value)
        elif pair:
            self.keys.append(pair[0])
            self.values.append(pair[1])
        elif value is not None:
            self.keys.append(key)
            self.values.append(value)

    def add_all(self, other: "PairList | None") -> None:
        if other:
            self.keys.extend(other.keys)
            self.values.extend(other.values)

    def size(self) -> int:
        return len(self.keys)

    def is_empty(self) -> bool:
        return not self.keys

    def get(self, key: Any) -> Any:
        """The first value of this key; None when it is not there."""
        return self.values[self.keys.index(key)] if key in self.keys else None

    def key_at(self, index: int) -> Any:
        return self.keys[index]

    def value_at(self, index: int) -> Any:
        return self.values[index]

    def get_keys(self) -> list[Any]:
        return self.keys

    def get_values(self) -> list[Any]:
        return self.values
