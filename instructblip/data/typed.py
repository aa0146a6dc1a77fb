"""The boundary for JSON that others wrote: text in, values of a known type and size out.

Annotations of raw files, records and indexes of shards and manifests all come through here, so that a wrong value is named
where it enters and never reaches a template, a tokenizer or a page. Who reads decides what a wrong value costs: a record,
an image or the whole file.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self, TypeGuard

MAX_TEXT = 1_000_000  # characters of one text; the longest of the known datasets has 13,000
MAX_WHOLE = 2**63 - 1  # what an index of int64 can hold
_MAX_NAME_BYTES = 255  # of one part of a path, on every usual file system
_MAX_PATH_BYTES = 1000
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(?:\.0*)?")


class WrongValueError(ValueError):
    """A value of another type, form or size than is due.

    Attributes:
        detail: what is particular to this one, such as its name.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        """`reason`, the message, is what its record is counted under."""
        super().__init__(reason)
        self.detail = detail


# --- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(content: bytes | str, constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        content: UTF-8 where it is bytes.
        constant: makes a value of `NaN`, `Infinity` and `-Infinity`, which JSON does not have; None: they are wrong.

    Raises:
        WrongValueError: not UTF-8, not JSON, nested too deep, or one of those three.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        return json.loads(text, parse_constant=constant or _refuse_constant)
    except UnicodeDecodeError as error:
        raise WrongValueError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise WrongValueError(f"not whole JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise WrongValueError("nested too deep") from None
    except WrongValueError:
        raise
    except ValueError:  # the interpreter's bound on the digits of a number
        raise WrongValueError("a number has too many digits") from None


def _refuse_constant(name: str) -> None:
    raise WrongValueError(f"{name} is no number of JSON")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for a reason."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", list: "a list", tuple: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


# --- values that may be wrong: None ----------------------------------------------------------------------------------


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a JSON value is text with something in it; half of a surrogate pair, which UTF-8 cannot hold, is none."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_TEXT and is_unicode(value)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text; half of a surrogate pair, which JSON can say, has no form in it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_text(value: Any) -> str | None:
    """Text on one line with single spaces; None for what is no text, is blank, or cannot be written as UTF-8."""
    return " ".join(value.split()) or None if is_text(value) else None


def texts(value: Any) -> tuple[str, ...]:
    """A JSON list of texts, each on one line; none when it is no list or holds anything else."""
    cleaned = [clean_text(item) for item in value] if isinstance(value, list) else []
    return () if None in cleaned else tuple(text for text in cleaned if text is not None)


def spoken(value: Any) -> Any:
    """A number as the text that a person would write, 3 for 3.0; any other value as it is.

    For answers and choices: tables and converters turn "3" into a number.
    """
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if type(value) is int else value


def whole_number(value: Any) -> int | None:
    """A whole number from 7, 7.0, "7" or "7.0"; None for any other value, or one that int64 cannot hold."""
    if isinstance(value, str):
        text = value.strip()
        number = int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None
    elif isinstance(value, float):
        number = int(value) if value.is_integer() else None
    else:
        number = value if type(value) is int else None
    return number if number is not None and abs(number) <= MAX_WHOLE else None


def identifier(value: Any) -> str | None:
    """An id as text: a number without a fraction, or printable text that is no path. None for any other value."""
    if isinstance(value, float):
        value = whole_number(value)
    text = str(value) if type(value) is int and abs(value) <= MAX_WHOLE else value
    return file_name(text.strip()) if isinstance(text, str) else None


def file_name(value: Any) -> str | None:
    """The name of a file, without a folder before it; None for what could name a file elsewhere, or a hidden one."""
    if not is_text(value) or not value.isprintable() or "/" in value or "\\" in value or value.startswith("."):
        return None
    return value if len(value.encode()) <= _MAX_NAME_BYTES else None


def path_below(value: Any) -> str | None:
    """A relative path that an annotation gives, or None for what is no path or would leave its folder (`/`, `..`)."""
    if not is_text(value) or not value.isprintable() or len(value.encode()) > _MAX_PATH_BYTES:
        return None
    path = PurePosixPath(value)
    sound = not path.is_absolute() and ".." not in path.parts
    return str(path) if sound and all(len(part.encode()) <= _MAX_NAME_BYTES for part in path.parts) else None


# --- fields of an object: a value or the reason why not --------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object. Each method gives a value of its type, or raises `WrongValueError` with the reason.

    `null` and a field that is not there are the same.
    """

    values: Mapping[str, Any]

    @classmethod
    def of(cls, value: Any, name: str = "entry") -> Self:
        """The fields of a value that must be an object."""
        if not isinstance(value, dict):
            raise WrongValueError(f"{name} is {kind_of(value)} where an object is due")
        return cls(value)

    def get(self, key: str) -> Any:
        """The value as it stands; None where there is none."""
        return self.values.get(key)

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        """Text on one line with single spaces."""
        return " ".join(self.verbatim(key).split())

    def verbatim(self, key: str) -> str:
        """Text as it stands, without the space around it."""
        value = self._present(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text is due")
        if not is_text(value):
            known = "is blank" if not value.strip() else "is too long" if len(value) > MAX_TEXT else None
            raise WrongValueError(f"{key} {known or 'holds half a Unicode pair'}")
        return value.strip()

    def optional_text(self, key: str) -> str | None:
        """Text on one line; None for any other value."""
        return clean_text(self.get(key))

    def answer(self, key: str) -> str:
        """Text on one line, which may stand there as a number."""
        return Fields({key: spoken(self.get(key))}).text(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of one text or more, each on one line; some may stand there as numbers."""
        values = self.items(key)
        if not values:
            raise WrongValueError(f"{key} is empty")
        found = tuple(text for value in values if (text := clean_text(spoken(value))) is not None)
        if len(found) < len(values):
            raise WrongValueError(f"{key} holds something else than text")
        return found

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self._present(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list is due")
        return value

    def inner(self, key: str) -> "Fields":
        """The fields of an object within; none of them where there is no object."""
        value = self.get(key)
        return Fields(value if isinstance(value, dict) else {})

    def whole(self, key: str, low: int = 0, high: int = MAX_WHOLE) -> int:
        """A whole number from `low` to `high`, which may stand there as text or as 1.0."""
        number = whole_number(self._present(key))
        if number is None:
            raise self._wrong(key, "a whole number is due")
        if not low <= number <= high:
            raise WrongValueError(f"{key} is not {f'{low} or more' if high == MAX_WHOLE else f'from {low} to {high}'}")
        return number

    def id(self, key: str) -> str:
        """An id as text: a number, or printable text that is no path."""
        value = self._present(key)
        found = identifier(value)
        if found is None:
            raise self._wrong(key, "an id is due") if not isinstance(value, str) else self._no_name(key, "is no id")
        return found

    def file_name(self, key: str) -> str:
        """The name of a file in a folder that is known."""
        value = self._present(key)
        found = file_name(value)
        if found is None:
            raise (
                self._wrong(key, "the name of a file is due")
                if not isinstance(value, str)
                else self._no_name(key, "is not the name of a file in its folder")
            )
        return found

    def _present(self, key: str) -> Any:
        value = self.values.get(key)
        if value is None:
            raise WrongValueError(f"{key} is missing")
        return value

    def _wrong(self, key: str, due: str) -> WrongValueError:
        return WrongValueError(f"{key} is {kind_of(self.values[key])} where {due}")

    def _no_name(self, key: str, what: str) -> WrongValueError:
        return WrongValueError(f"{key} is blank" if not self.values[key].strip() else f"{key} {what}")
