"""The one check of options, arguments, records and JSON files: what a value has to be stands in its annotation.

`Annotated[int, between(1, 64)]` is an integer of that range. A dataclass on `Checked` is checked as it is made, field
by field and then by its own `rules`; `from_json` makes one of a file's content; `checked` is for single arguments,
`real_array` for numbers (tensors: `exact`).
Whatever does not fit is an `RsdError` of one line: where, what was expected, what was found.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
At = tuple[str, ...]  # names of fields from the outermost one on, and "[3]" for a place in a list
Name = Callable[[At], str]
Rules = Iterator[tuple[object, str, object]]
Shape = Sequence[int | str | Any]  # a number, a name for any size, and `...` in front for any number of sizes
LISTS = "numbers and ranges such as 0,3,10-19"
MOST_LISTED = 1_000_000  # numbers in a range: more is a slip, and would take minutes and gigabytes
SHOWN = 60  # characters of an odd value in a message
KINDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
LARGEST = {int: 2**63 - 1, float: sys.float_info.max}
LATER: ContextVar[bool] = ContextVar("later", default=False)


class RsdError(Exception):
    """An error the user can act on: the message names what was expected, what was found and what to do."""


class WrongOption(RsdError):
    """What keeps every episode from being run, an option or a folder: another attempt would end in the same way."""


class Where(NamedTuple):
    """What a value has to be beside its type; words: follow those of the type, "from 1 to 64"."""

    holds: Callable[[Any], object]
    words: str


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def between(low: float, high: float) -> Where:
    """low and high are allowed."""
    return Where(lambda value: low <= value <= high, f"from {_plain(low)} to {_plain(high)}")


def above(low: float, high: float) -> Where:
    """low is not allowed, high is."""
    return Where(lambda value: low < value <= high, f"above {_plain(low)}, at most {_plain(high)}")


def within(low: float, high: float) -> Where:
    """Neither low nor high is allowed."""
    return Where(lambda value: low < value < high, f"between {_plain(low)} and {_plain(high)}")


def multiple(of: int) -> Where:
    return Where(lambda value: value % of == 0, f"that is a multiple of {of}")


def one_of(names: Iterable[str]) -> Where:
    allowed = tuple(names)
    return Where(lambda value: value in allowed, f"that is one of {', '.join(allowed)}")


Share = Annotated[float, between(0, 1)]
Proper = Annotated[float, within(0, 1)]  # a risk or a confidence
Weight = Annotated[float, between(0, 1e6)]  # of a part of a loss
Count = Annotated[int, between(0, 1e9)]
Some = Annotated[int, between(1, 1e9)]  # a count that cannot be 0
ImageSize = Annotated[int, between(1, 4096)]
Seed = Annotated[int, between(0, 2**32 - 1)]
Millimetres = Annotated[float, between(0, 1e12)]  # 1e9 is how somebody says: whatever it is
Epsilon = Annotated[float, above(0, 1e6)]  # in mm: a chunk deviates beyond it
Time = Annotated[float, between(0, 1e12)]  # in ms or s
Word = Annotated[str, Where(lambda t: t.isprintable() and len(t) <= 200, "of at most 200 printable characters")]
Said = Annotated[str, Where(str.strip, "that is not blank")]
Sha256 = Annotated[str, Where(re.compile("[0-9a-f]{64}").fullmatch, "that is a SHA-256 in hexadecimal")]


class Checked:
    """Base of dataclasses that are checked as they are made."""

    def __post_init__(self) -> None:
        if not LATER.get():
            check(self)

    def rules(self) -> Rules:
        """What its values, each of which is checked already, have to be together: (whether it holds, what is expected,
        what is found)."""
        yield from ()


def dotted(at: At) -> str:
    return "".join(part if part.startswith("[") else f".{part}" for part in at)[1:]


def check(record: Any, name: Name = dotted) -> None:
    """`RsdError` unless a dataclass holds what its annotations and its `rules` say; a list for a tuple, text for a path
    and NumPy's numbers become what they stand for."""
    _check_fields(record, name, ())


@contextlib.contextmanager
def checked_later() -> Iterator[None]:
    """What is made inside is checked by whoever knows where it stands."""
    token = LATER.set(True)
    try:
        yield
    finally:
        LATER.reset(token)


def checked(kind: Any, value: Any, name: str) -> Any:
    """The value of an argument, as the annotation `kind` has it."""
    return _fitted(kind, value, lambda at: dotted((name, *at)), ())


def from_json(kind: type[T], content: dict[str, Any], where: str, ignore: Iterable[str] = ()) -> T:
    """A dataclass, and the dataclasses in it, of a JSON object: known fields, none missing that has no default.

    where: begins the message of an `RsdError`, a file's name. ignore: keys of the object that are no fields.
    """
    known = {name: content[name] for name in content.keys() - set(ignore)}

    def name(at: At) -> str:
        return f"{where}: field {dotted(at)}" if at else where

    made: T = _made(kind, known, name, ())
    return made


def shown(value: Any, most: int = SHOWN) -> str:
    """A value for a message, on one line and of at most so many characters."""
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def told(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, on one line and without the numbers that the operating system gives them."""
    text = re.sub(r"\[Errno -?\d+\] | ?\(os error \d+\)", "", one_line(str(error)))
    return text[:most] or type(error).__name__


def one_line(text: str) -> str:
    """Somebody else's words, for a terminal: on one line, without codes that would steer it."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def last_line(log: str) -> str:
    """What a traceback says in the end: all that follows its last line of source, on one line."""
    lines = log.strip().splitlines()
    ends = [number for number, line in enumerate(lines, 1) if line.startswith("  ")]
    return one_line(" ".join(lines[ends[-1] if ends else -1 :]))[:500] or "error"


def number(text: str) -> int | None:
    """Digits -> a number; None for anything else, such as more digits than anything here has."""
    digits = text.strip()
    return int(digits) if digits.isdecimal() and digits.isascii() and len(digits) < 12 else None


def listed(text: str, option: str = "", most: int = 10**12, words: str = LISTS) -> list[int]:
    """Of "0,3,10-12" 0, 3, 10, 11, 12; `RsdError` for anything else, for numbers from `most` on and for one twice."""
    found: dict[int, None] = {}
    where = f"{option}: " if option else ""
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low, high = number(first), number(last if dash else first)
        if low is None or high is None or low > high:
            raise RsdError(f"{where}expected {words}, found {shown(text)}")
        if high >= most or high - low >= MOST_LISTED:
            raise RsdError(f"{where}expected at most {MOST_LISTED} numbers, all below {most}, found {shown(text)}")
        if again := found.keys() & {*range(low, high + 1)}:
            raise RsdError(f"{where}expected each once, found {min(again)} twice in {shown(text)}")
        found.update(dict.fromkeys(range(low, high + 1)))
    return list(found)


def each_once(what: str, paths: Iterable[str | Path]) -> None:
    """`RsdError` where two paths lead to one place, or one to a file in another: its content would count twice."""
    places = [Path(os.path.realpath(path)) for path in paths]
    for index, place in enumerate(places):
        if place in places[:index] or (place.is_file() and place.parent in places):
            raise RsdError(f"{what}: expected each once, found {place} twice")


def check_shape(what: str, found: Sequence[int], expected: Shape) -> None:
    """`RsdError` unless the sizes are those: ("B", 8, 7), or (..., 7); of one name are equal ones, ("S", "S", 3)."""
    wanted = [size for size in expected if size is not ...]
    rest = list(found)[max(0, len(found) - len(wanted)) :] if len(wanted) < len(expected) else list(found)
    named = dict(zip(wanted, rest, strict=False))
    if rest != [size if isinstance(size, int) else named.get(size) for size in wanted]:
        words = ", ".join("..." if size is ... else str(size) for size in expected)
        raise RsdError(f"{what}: expected [{words}], found {list(found)}")


def real_array(what: str, values: Any, dtype: str = "float32", shape: Shape = (...,)) -> NDArray[Any]:
    """Finite numbers of an array or a sequence, float or integer, as `dtype`; `RsdError` for bool, complex, text."""
    import numpy as np  # half of the time that `rsd --help` would take

    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths; a tensor on another device
        raise RsdError(f"{what}: expected numbers, found {type(values).__name__} ({error})") from None
    if found.dtype.kind not in "iuf" or np.ma.is_masked(values):
        kind = "masked ones" if np.ma.is_masked(values) else found.dtype
        raise RsdError(f"{what}: expected real numbers, found {kind}")
    check_shape(what, found.shape, shape)
    with np.errstate(over="ignore"):
        cast = found.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        raise RsdError(f"{what}: expected finite numbers, found NaN, infinity, or one beyond {dtype}")
    return cast


@cache
def _hints(kind: Any) -> dict[str, tuple[Any, str]]:
    """Of each field that is given: its annotation, and what it is called (tyro's options may have other names)."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    for entry in fields(kind):
        if entry.init:
            named = (extra.name for extra in getattr(hints[entry.name], "__metadata__", ()) if hasattr(extra, "name"))
            found[entry.name] = (hints[entry.name], next((n for n in named if n is not None), entry.name))
    return found


def _check_fields(record: Any, name: Name, at: At) -> None:
    of: Any = type(record)
    for field, (kind, called) in _hints(of).items():
        value = getattr(record, field)
        if (fitted := _fitted(kind, value, name, (*at, called) if called else at)) is not value:
            object.__setattr__(record, field, fitted)
    _check_rules(record, name, at)


def _check_rules(record: Any, name: Name, at: At) -> None:
    if not isinstance(record, Checked):
        return
    where = f"{name(at)}: " if name(at) else ""
    try:
        for holds, expected, found in record.rules():
            if not holds:
                raise RsdError(f"expected {expected}, found {found if isinstance(found, str) else shown(found)}")
    except RsdError as error:
        raise type(error)(f"{where}{error}") from None


def _made(kind: Any, content: dict[str, Any], name: Name, at: At) -> Any:
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(kind) if entry.init}
    required = {field for field, entry in known.items() if entry.default is entry.default_factory is MISSING}
    missing, unknown = sorted(required - content.keys()), sorted(content.keys() - known.keys())
    if missing or unknown:
        where = name(()) + (": " if name(()) else "")
        found = f"missing {shown(missing)}, unknown {shown(unknown)}"
        raise RsdError(f"{where}unknown or missing field of {dotted(at) or kind.__name__}: {found}")
    hints = _hints(kind)
    values = {field: _fitted(hints[field][0], value, name, (*at, field)) for field, value in content.items()}
    with checked_later():
        made = kind(**values)
    _check_rules(made, name, at)
    return made


def _fitted(kind: Any, value: Any, name: Name, at: At) -> Any:
    """The value as an annotation has it."""
    found = _of_type(kind, value, name, at)
    if found is NotImplemented:
        raise RsdError(f"{name(at)}: expected {_words(kind)}, found {shown(value)}")
    return found


def _of_type(kind: Any, value: Any, name: Name, at: At) -> Any:
    """NotImplemented where it is of another type; `RsdError` where something in it is."""
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _of_type(arguments[0], value, name, at)
        tests = [extra for extra in arguments[1:] if isinstance(extra, Where)]
        return found if found is NotImplemented or all(test.holds(found) for test in tests) else NotImplemented
    if origin in (Union, types.UnionType):
        tried = (_of_type(part, value, name, at) for part in arguments)
        return next((found for found in tried if found is not NotImplemented), NotImplemented)
    if origin is Literal:
        return value if isinstance(value, str | int) and value in arguments else NotImplemented
    if origin is list and isinstance(value, list):
        numbers = all(map(_surely(arguments[0]), value))
        return list(value) if numbers else _items(value, arguments * len(value), name, at)
    if origin is tuple and isinstance(value, list | tuple):
        parts = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_items(value, parts, name, at)) if len(parts) == len(value) else NotImplemented
    if origin is dict and isinstance(value, dict):
        keys = [_fitted(arguments[0], key, name, at) for key in value]
        return {key: _fitted(arguments[1], value[key], name, (*at, str(key))) for key in keys}
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, dict):
            return _made(kind, value, name, at)
        if isinstance(value, Checked):
            _check_fields(value, name, at)
        return value if isinstance(value, kind) else NotImplemented
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return value if number and abs(value) <= LARGEST[kind] else NotImplemented
    if kind in (str, Path) and isinstance(value, str | Path) and "\0" in str(value):  # no path may hold it
        raise RsdError(f"{name(at)}: expected text without the character NUL, found {shown(value)}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    expected = type(None) if kind is None else origin or kind
    return value if not isinstance(expected, type) or isinstance(value, expected) else NotImplemented


@cache
def _surely(kind: Any) -> Callable[[Any], bool]:
    """A quick test that no value passes but a number, or null, as the annotation says. The results of an evaluation are
    millions of them."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (int, float):
        exact, most = (int,) if kind is int else (int, float), LARGEST[kind]
        return lambda value: type(value) in exact and abs(value) <= most
    if origin is Annotated:
        sure, tests = _surely(arguments[0]), [extra.holds for extra in arguments[1:] if isinstance(extra, Where)]
        return lambda value: sure(value) and all(holds(value) for holds in tests)
    if origin in (Union, types.UnionType):
        parts = [_surely(part) for part in arguments]
        return lambda value: any(part(value) for part in parts)
    return lambda value: value is None and kind is type(None)


def _items(values: Iterable[Any], kinds: Iterable[Any], name: Name, at: At) -> list[Any]:
    return [_fitted(k, v, name, (*at, f"[{i}]")) for i, (k, v) in enumerate(zip(kinds, values, strict=True))]


def _words(kind: Any) -> str:
    """An annotation in a message's words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = [_words(arguments[0]), *(extra.words for extra in arguments[1:] if isinstance(extra, Where))]
        return " ".join(words).removeprefix("text that is ")
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and ... not in arguments:
        return f"{len(arguments)} values, each {_words(arguments[0])}"
    if origin in (list, tuple):
        return f"a list, each of it {_words(arguments[0])}"
    if origin is dict or is_dataclass(kind):
        return "an object" if origin is dict else kind.__name__
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part) for part in arguments)
    return str(KINDS.get(kind, getattr(kind, "__name__", kind)))

