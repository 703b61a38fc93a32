"""Rules that check the values of the fields of `Config` and `SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, TypeVar

from utils.errors import FieldError, did_you_mean

T = TypeVar("T")

_LISTS = frozenset((list, tuple))
_PLAIN = frozenset((int, float, bool, str, type(None), list, tuple))


@dataclass(frozen=True, slots=True)
class Rule:
    """A check of a value, and the `problem` and `fix` of the FieldError for a wrong value."""

    allows: Callable[[Any], bool]
    problem: str
    fix: str | Callable[[Any], str]  # a text, or a function that makes the text from the value


def ruled(default: T, rule: Rule) -> T:
    """Return a dataclass field that has a default and a rule."""
    return field(default=default, metadata={"rule": rule})


def rules_of(kind: type) -> dict[str, Rule]:
    """Return the rules of a dataclass: a dict from the field's name to its rule."""
    return {one.name: one.metadata["rule"] for one in fields(kind) if "rule" in one.metadata}


def check_rules(
    values: object,
    rules: Mapping[str, Rule],
    error: type[FieldError],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise `error` for the first field whose rule does not allow the field's value.

    Before, None is replaced by the field's value in `defaults`, if there is one, and values of
    NumPy and torch by values of Python. The fields are changed, even if `values` is frozen.
    """
    for name, rule in rules.items():
        value = getattr(values, name)
        if value is None and defaults and name in defaults:
            value = defaults[name]
            object.__setattr__(values, name, value)
        # The types of almost all values are in `_PLAIN`, which is faster than asking the values.
        elif type(value) not in _PLAIN or (type(value) in _LISTS and value):
            value = plain(value)
            object.__setattr__(values, name, value)
        if not rule.allows(value):
            fix = rule.fix if isinstance(rule.fix, str) else rule.fix(value)
            raise error(name, value, rule.problem, fix)


def plain(value: Any) -> Any:
    """Return a scalar, an array or a list of scalars of NumPy or torch in the types of Python."""
    if type(value) in _LISTS:
        kinds = set(map(type, value))
        return value if kinds <= _PLAIN else type(value)(map(plain, value))
    if type(value) is dict and not set(map(type, (*value, *value.values()))) <= _PLAIN:
        # Values in dictionaries within are left as they are, e.g. those of a JSON schema.
        return {_scalar(key): _scalar(one) for key, one in value.items()}
    return _scalar(value)


def _scalar(value: Any) -> Any:
    has_values = hasattr(value, "dtype") and hasattr(value, "tolist")
    return value.tolist() if has_values and not isinstance(value, type) else value


def is_int(value: object) -> bool:
    """Return whether the value is an int but not a bool."""
    return isinstance(value, int) and value is not True and value is not False


def _is_number(value: Any, low: float, high: float) -> bool:
    return (is_int(value) or isinstance(value, float)) and low <= value <= high


def integer(low: int, high: float = inf, fix: str = "", *, optional: bool = False) -> Rule:
    """Return a rule that allows integers from `low` to `high`. If `optional`, None is allowed."""
    words = f">= {low}" if high == inf else f"from {low} to {high}"
    return Rule(
        lambda v: optional if v is None else is_int(v) and low <= v <= high,
        f"must be an integer {words}" + (" or None" if optional else ""),
        fix or f"Use {low} or more.",
    )


def number(low: float, high: float, fix: str) -> Rule:
    """Return a rule that allows numbers from `low` to `high`."""
    problem = f"must be a number from {low:g} to {high:g}"
    return Rule(lambda v: _is_number(v, low, high), problem, fix)


def share(fix: str) -> Rule:
    """Return a rule that allows numbers that are above 0 and at most 1."""
    return Rule(lambda v: _is_number(v, 0, 1) and v > 0, "must be a number in (0, 1]", fix)


def boolean(*, optional: bool = False) -> Rule:
    """Return a rule that allows True and False. If `optional`, None is allowed as well."""
    allowed = (bool, type(None)) if optional else bool
    return Rule(lambda v: isinstance(v, allowed), "must be a bool", "Use True or False.")


def choice(*known: str) -> Rule:
    """Return a rule that allows only the strings in `known`."""
    return Rule(known.__contains__, "unknown choice", lambda v: did_you_mean(str(v), known))


def several(allows: Callable[[Any], bool], words: str, fix: str) -> Rule:
    """Return a rule that allows a list if `allows(value)` is True for every value in the list."""
    problem = f"must be a list of {words}"
    return Rule(lambda v: isinstance(v, (list, tuple)) and all(map(allows, v)), problem, fix)
