"""Finding a part by name, import path, class or factory, without a table to edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from config import PartSpec
from utils.errors import ConfigError, did_you_mean


def parts_in(package: str, base: type) -> dict[str, type]:
    """The concrete subclasses of `base` defined in the modules of `package`, by their `name`.

    A class without a name is only there to be subclassed. A module whose optional dependency is
    missing is passed over.
    """
    found: dict[str, type] = {}
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        try:
            module = importlib.import_module(f"{package}.{info.name}")
        except ImportError:
            continue
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and issubclass(value, base)
                and value.__module__ == module.__name__
                and not inspect.isabstract(value)
                and hasattr(value, "name")
            ):
                found[value.name] = value
    return found


def find_part(field: str, spec: PartSpec, base: type, package: str) -> Callable[..., Any]:
    """What constructs the part that `spec` stands for.

    Args:
        field: the option it came from, for error messages.
        spec: a class or factory; "package.module:Name"; or the `name` of a class in `package`.
        base: the contract that classes must subclass.

    Raises:
        ConfigError: there is no such part, or it does not implement the contract.
    """
    if isinstance(spec, str):
        part = _import(field, spec) if ":" in spec else parts_in(package, base).get(spec)
        if part is None:
            raise ConfigError(
                field,
                spec,
                f"no {base.__name__} of that name in {package}",
                did_you_mean(spec, parts_in(package, base)) + ' Or give "package.module:Class".',
            )
    else:
        part = spec
    if inspect.isclass(part) and (not issubclass(part, base) or inspect.isabstract(part)):
        missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
        problem = f"does not implement {missing}" if missing else f"is no {base.__name__}"
        raise ConfigError(field, part, problem, f"Subclass {base.__module__}.{base.__name__}.")
    if not callable(part):
        raise ConfigError(field, part, "cannot be constructed", "Name a class or a factory.")
    return part


def construct(field: str, base: type, make: Callable[..., Any], *args: Any) -> Any:
    """Call a part's constructor or factory.

    Raises:
        ConfigError: what comes out does not implement the contract.
    """
    part = make(*args)
    if not isinstance(part, base):
        raise ConfigError(
            field, make, f"made {part!r}, no {base.__name__}", f"Return a {base.__name__}."
        )
    return part


def _import(field: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            field,
            path,
            f"cannot be imported ({error})",
            "Check the module path and the class name.",
        ) from error
