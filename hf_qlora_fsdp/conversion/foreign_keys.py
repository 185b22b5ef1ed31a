"""The keys of a file that was written for another program, each taken once.

A run that somebody converts must be the run they had, or they must hear where it is not. So no key of the file may go
missing between two lines of code: a reader *takes* keys out of the file, whatever it does with them, and a key that
nobody took is unknown, an error with the nearest right name. What is taken has one of three fates:

* it **becomes** a value of ours (`values`);
* it is **not used**, because the result is the same without it: one note, with the reason (`notes`);
* it is **refused**, because the result would be another: an error that says what to write instead.

A key without a value (`wandb_project:`) was not given. One that asks for nothing (`load_in_8bit: false`) needs no line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..translation import nearest, parse_bool, refusal

# Why, and what to write instead.
Reason = tuple[str, str]


def spread(*groups: tuple[Any, str]) -> dict[str, Any]:
    """Return a table from groups of keys that share an entry: `(entry, "key key key")`."""
    table: dict[str, Any] = {}
    for entry, keys in groups:
        for key in keys.split():
            assert key not in table, f"{key} stands in two groups"
            table[key] = entry
    return table


class ForeignKeys:
    """
    The keys of a file, or of one mapping inside it.

    Args:
        program (`str`): Whose file it is, for the errors.
        keys (`Mapping[str, object]`): What it says.
        inside (`str`, *optional*): The key that the mapping lies under, such as `"datasets[0]"`.

    Attributes:
        values (`dict[str, object]`): What it says in our terms.
        notes (`list[str]`): A line for each key that is not used, with the reason.
    """

    def __init__(self, program: str, keys: Mapping[Any, object], inside: str = "") -> None:
        self.program = program
        self.values: dict[str, object] = {}
        self.notes: list[str] = []
        self._keys = {str(key): value for key, value in keys.items() if value is not None}
        self._prefix = f"{inside}." if inside else ""

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def say(self, key: str, value: object) -> str:
        """Return a key and its value as the user wrote them."""
        return f"{self._prefix}{key}: {value!r}"

    def take(self, key: str, default: Any = None) -> Any:
        """Take a key out of the file."""
        return self._keys.pop(key, default)

    def take_switch(self, key: str, default: bool = False) -> bool:
        """Take a key that is on or off."""
        value = self.take(key, default)
        return parse_bool(self.say(key, value), value)

    def take_number(self, key: str, kind: type = float, default: Any = None) -> Any:
        """Take a number. `2e-5` without a point is text to a YAML parser, and a number to everybody else."""
        value = self.take(key, default)
        if value is None:
            return None
        try:
            if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
                raise ValueError
            return value if isinstance(value, int) else kind(float(value))
        except (TypeError, ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            raise self.refusal(key, value, f"it takes {wanted}", f"Write {wanted}.") from None

    def take_list(self, key: str) -> list[Any]:
        """Take a list, or what may stand alone instead of a list of one."""
        value = self.take(key, [])
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def take_mapping(self, key: str) -> dict[str, Any]:
        """Take a mapping, `{}` if there is none."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, "it takes a mapping", "Write options below it, each with its value.")
        return dict(value)

    def demand(self, key: str, what: str) -> Any:
        """Take a key that the program asks for as well."""
        if key not in self._keys:
            raise refusal(
                f"a file of {self.program} without {self._prefix}{key}",
                f"it names {what}, and there is no default",
                f"Add {self._prefix}{key}: ... to the file.",
            )
        return self.take(key)

    def note(self, key: str, value: object, why: str) -> None:
        """Say that a key is not used."""
        self.notes.append(f"{self.say(key, value)} is not used: {why}.")

    def refusal(self, key: str, value: object, why: str, instead: str) -> ValueError:
        """Return the error for a key that cannot be honoured."""
        return refusal(f"{self.say(key, value)} in a file of {self.program}", why, instead)

    def rename(self, names: Mapping[str, tuple[str, type]]) -> None:
        """Take keys that are ours under another name: `{key: (our name, type)}`, `object` for any type."""
        for key in [key for key in names if key in self._keys]:
            ours, kind = names[key]
            if kind is bool:
                value: object = self.take_switch(key)
            elif kind is list:
                value = self.take_list(key)
            elif kind is dict:
                value = self.take_mapping(key)
            elif kind in (int, float):
                value = self.take_number(key, kind)
            else:
                value = self.take(key)
            if self.values.get(ours, value) != value:
                raise self.refusal(key, value, f"another key gives {ours}={self.values[ours]!r}", "Remove one of them.")
            self.values[ours] = value

    def refuse(self, reasons: Mapping[str, Reason], harmless: Mapping[str, object]) -> None:
        """Take keys that cannot be honoured.

        Args:
            reasons (`Mapping[str, Reason]`): Why not, and what to write instead.
            harmless (`Mapping[str, object]`): A value, for some, that asks for nothing; off, zero or empty always does.

        Raises:
            ValueError: One of them asks for something.
        """
        for key in [key for key in reasons if key in self._keys]:
            value = self.take(key)
            word = str(value).strip().lower()
            if value and word not in ("false", "no", "off", "none", "0") and value != harmless.get(key):
                raise self.refusal(key, value, *reasons[key])

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Take keys that make no difference here, with a note for each: `{key: why}`."""
        for key in [key for key in reasons if key in self._keys]:
            self.note(key, self.take(key), reasons[key])

    def finish(self) -> None:
        """Hold that every key was taken."""
        assert not self._keys, f"nobody took {sorted(self._keys)}"

    def check(self, *known: Iterable[str]) -> None:
        """Refuse keys that the program does not know.

        Raises:
            ValueError: There is one, with the nearest right name.
        """
        names = {name for group in known for name in group}
        for key in self._keys:
            if key not in names:
                hint = nearest(key, names).split("Known:")[0] or "Look it up in that program's documentation. "
                raise refusal(
                    f"{self.say(key, self._keys[key])} in a file of {self.program}",
                    "no such key is known, so nobody can say what it would change",
                    f"{hint}Remove it if it does nothing.",
                )
