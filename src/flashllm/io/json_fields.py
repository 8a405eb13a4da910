# SPDX-License-Identifier: Apache-2.0
"""Checked entries of a JSON object that may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flashllm.errors import FormatError, brief
from flashllm.formats.check import is_int

_MOST = 2**60


class Fields:
    """The entries of ``value``, each taken once; every method raises a ``FormatError`` that names the entry."""

    def __init__(self, value: Mapping[str, Any], where: str, path: str) -> None:
        """``where`` is the name of the object in its file ``path``, empty for the whole file."""
        self._left = dict(value)
        self._where, self._path = where, path

    def refuse(self, key: str, expected: str, got: object) -> NoReturn:
        """Raise the error for entry ``key``."""
        raise FormatError(field=self._name(key), expected=expected, got=brief(got), path=self._path)

    def finish(self) -> None:
        """Refuse the entries that were not taken."""
        for key in self._left:
            self.refuse(key, "no such entry", self._left[key])

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            self.refuse(key, "a non-empty string", value)
        return value

    def text_or_none(self, key: str) -> str | None:
        """A string that is not empty, or null."""
        if self._left.get(key, "") is None:
            self.none(key)
            return None
        return self.text(key)

    def none(self, key: str) -> None:
        """Null."""
        value = self._take(key)
        if value is not None:
            self.refuse(key, "null", value)

    def one_of(self, key: str, choices: Sequence[str]) -> str:
        """One of some strings."""
        value = self._take(key)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}", value)
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", value)
        return value

    def count(self, key: str, *, least: int = 0, most: int = _MOST) -> int:
        """An integer in a range."""
        value = self._take(key)
        if not is_int(value) or not least <= value <= most:
            self.refuse(key, f"an integer in {least}..{most}", value)
        return value

    def counts(self, key: str, *, least: int = 0, most: int = _MOST) -> tuple[int, ...]:
        """A list of integers in a range."""
        value = self._take(key)
        if not isinstance(value, list) or not all(is_int(one) and least <= one <= most for one in value):
            self.refuse(key, f"a list of integers in {least}..{most}", value)
        return tuple(value)

    def same(self, key: str, wanted: object) -> None:
        """Exactly ``wanted``."""
        value = self._take(key)
        if type(value) is not type(wanted) or value != wanted:
            self.refuse(key, brief(wanted), value)

    def entry(self, key: str) -> Fields:
        """An object."""
        return self._entry(self._take(key), key)

    def entries(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self._take(key)
        if not isinstance(value, list):
            self.refuse(key, "a list of objects", value)
        return [self._entry(one, f"{key}[{number}]") for number, one in enumerate(value)]

    def _entry(self, value: object, key: str) -> Fields:
        if not isinstance(value, dict):
            self.refuse(key, "an object", value)
        return Fields(value, self._name(key), self._path)

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _take(self, key: str) -> Any:
        if key not in self._left:
            raise FormatError(field=self._name(key), expected="an entry", got="none", path=self._path)
        return self._left.pop(key)
