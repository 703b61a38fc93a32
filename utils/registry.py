"""Finding a part by name, import path, class or factory, without a table to edit."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from config import PartSpec
from utils.errors import ConfigError, did_you_mean


def parts_in(package: str, base: type) -> dict[str, type]:
    """The concrete subclasses of `base` defined in the modules of `package`, by their `name`.

    A class without a name of its own is only there to be subclassed or chosen by the engine. A
    module whose optional dependency is missing is passed over.

    Raises:
        ImportError: a module imports what an installed package does not have.
    """
    found: dict[str, type] = {}
    for module in _modules(package)[0]:
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and issubclass(value, base)
                and value.__module__ == module.__name__
                and not inspect.isabstract(value)
                and "name" in vars(value)
            ):
                found[vars(value)["name"]] = value
    return found


def _modules(package: str) -> tuple[list[ModuleType], list[str]]:
    """The modules of a package, and which were passed over and why."""
    root = importlib.import_module(package)
    names = [f"{package}.{info.name}" for info in pkgutil.iter_modules(root.__path__)]
    tried = {name: _module(name) for name in names}
    modules = [module for module in tried.values() if isinstance(module, ModuleType)]
    passed_over = [f"{n} ({e})" for n, e in tried.items() if not isinstance(e, ModuleType)]
    return modules, passed_over


def _module(name: str) -> ModuleType | ModuleNotFoundError:
    """A module, or why it cannot be had: a package that it imports is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        if importlib.util.find_spec(missing) is not None:
            raise
        return error


def find_part(field: str, spec: PartSpec, base: type, *packages: str) -> Callable[..., Any]:
    """What constructs the part that `spec` stands for.

    Args:
        field: the option it came from, for error messages.
        spec: a class or factory; "package.module:Name"; or the `name` of a class in `packages`.
        base: the contract that classes must subclass.
        packages: where names are looked up.

    Raises:
        ConfigError: there is no such part, or it does not implement the contract.
    """
    if isinstance(spec, str):
        known: dict[str, type] = {}
        for package in packages if ":" not in spec else ():
            known |= parts_in(package, base)
        part = _import(field, spec) if ":" in spec else known.get(spec)
        if part is None:
            passed_over = [one for package in packages for one in _modules(package)[1]]
            without = f", not counting {', '.join(passed_over)}" if passed_over else ""
            raise ConfigError(
                field,
                spec,
                f"no {base.__name__} of that name in {' or '.join(packages)}{without}",
                did_you_mean(spec, known) + ' Or give "package.module:Class".',
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
        ConfigError: it takes other arguments, or what comes out does not implement the contract.
    """
    try:
        inspect.signature(make).bind(*args)
    except ValueError:
        pass  # some callables do not tell their arguments
    except TypeError as error:
        kinds = ", ".join(type(arg).__name__ for arg in args)
        raise ConfigError(
            field,
            make,
            f"cannot be called with ({kinds}): {error}",
            f"The docstring of {base.__module__}.{base.__name__} tells the arguments.",
        ) from error
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
