"""Finds the class or factory of an engine part, e.g. the scheduler, from an option's value."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from config import PartSpec
from utils.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class PartKind:
    """A replaceable part, such as the scheduler. An option of `Config` chooses the part's class."""

    option: str  # name of the option
    contract: str  # base class of all parts of this kind, as "module:Class"
    packages: tuple[str, ...]  # packages and modules that contain the parts
    auto: tuple[str, ...] = ()  # the option's value "auto" picks the first of these that works

    @property
    def base(self) -> type:
        """The base class of all parts of this kind, imported from the path `contract`."""
        return _imported(self.contract)  # type: ignore[no-any-return]

    def known(self) -> dict[str, type]:
        """Return a dict of the parts that the option can name, from name to class.

        These are the concrete subclasses of `base` in `packages` that define `name`. A module that
        needs a package that is not installed is skipped. Other import errors are raised.
        """
        base = self.base
        return {
            vars(value)["name"]: value
            for module in self._modules().values()
            if isinstance(module, ModuleType)
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, base)
            and value.__module__ == module.__name__
            and not inspect.isabstract(value)
            and "name" in vars(value)
        }

    def _modules(self) -> dict[str, ModuleType | ModuleNotFoundError]:
        modules: dict[str, ModuleType | ModuleNotFoundError] = {}
        for package in self.packages:
            modules[package] = found = importlib.import_module(package)
            for info in pkgutil.iter_modules(getattr(found, "__path__", ())):
                name = f"{package}.{info.name}"
                try:
                    modules[name] = importlib.import_module(name)
                except ModuleNotFoundError as error:
                    missing = (error.name or name).partition(".")[0]
                    if importlib.util.find_spec(missing) is not None:
                        raise
                    modules[name] = error
        return modules

    def find(self, spec: PartSpec) -> Callable[..., Any]:
        """Return the class or factory that `spec` names or is. ConfigError if there is none."""
        part: Any = self._named(spec) if isinstance(spec, str) else spec
        base = self.base
        if inspect.isclass(part) and (not issubclass(part, base) or inspect.isabstract(part)):
            missing = ", ".join(sorted(getattr(part, "__abstractmethods__", ())))
            problem = f"does not implement {missing}" if missing else f"is no {base.__name__}"
            fix = f"Subclass {base.__module__}.{base.__name__}."
            raise ConfigError(self.option, part, problem, fix)
        if not callable(part):
            fix = "Name a class or a factory."
            raise ConfigError(self.option, part, "cannot be constructed", fix)
        return part  # type: ignore[no-any-return]

    def _named(self, spec: str) -> Any:
        if ":" in spec:
            try:
                return _imported(spec)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                problem = f"cannot be imported ({error})"
                fix = "Check the module path and the class name."
                raise ConfigError(self.option, spec, problem, fix) from error
        known = self.known()
        if spec in known:
            return known[spec]
        passed_over = [f"{n} ({m})" for n, m in self._modules().items() if isinstance(m, Exception)]
        problem = f"no {self.base.__name__} of that name in {' or '.join(self.packages)}"
        if passed_over:
            problem += f", not counting {', '.join(passed_over)}"
        fix = did_you_mean(spec, known) + ' Or give "package.module:Class".'
        raise ConfigError(self.option, spec, problem, fix)

    def make(self, spec: PartSpec, *args: Any) -> Any:
        """Return `find(spec)(*args)`. ConfigError if `args` or the result do not fit."""
        make, base = self.find(spec), self.base
        try:
            inspect.signature(make).bind(*args)
        except ValueError:
            pass  # Python cannot tell the signature of `make`, so `args` are not checked
        except TypeError as error:
            kinds = ", ".join(type(arg).__name__ for arg in args)
            problem = f"cannot be called with ({kinds}): {error}"
            fix = f"The docstring of {base.__module__}.{base.__name__} tells the arguments."
            raise ConfigError(self.option, make, problem, fix) from error
        part = make(*args)
        if not isinstance(part, base):
            problem, fix = f"made {part!r}, no {base.__name__}", f"Return a {base.__name__}."
            raise ConfigError(self.option, make, problem, fix)
        return part


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
