"""Objects that a setting names: a file of one of our packages, or a user's ``module:Object``.

A package of plug-ins holds one object per file. The file's name is the object's name; the class has the same name in
capitals (``entropy_bounded.py`` holds ``EntropyBounded``). A new object needs only a new file.

This room imports nothing of ours, so it knows no ``UserError``. The reader of the setting turns the ValueError into
one that carries the key.
"""

import importlib
import os
import pkgutil
import sys
from typing import Any


def names(package: str) -> tuple[str, ...]:
    """The names of a package's files, in alphabetical order. Only the package itself is imported."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)))


def load(name: str, package: str) -> Any:
    """The object ``name``: of a file of ``package``, or ``module:Object``.

    Raises:
        ValueError: there is none; the text gives the reason and the remedy.
    """
    if ":" in name:
        return load_object(name)
    if name not in names(package):
        raise ValueError(f"must be one of {', '.join(names(package))}, or module:Object")
    module = importlib.import_module(f"{package}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))


def load_object(name: str) -> Any:
    """The object ``my_package.my_module:Object``; modules of the working folder are found too.

    Raises:
        ValueError: there is none, or its module fails on import; the text gives the reason and the remedy, in one line.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's, and may fail in any way
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"cannot import {module_name} ({reason}); correct the module or its name") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{module_name} has no object {attribute!r}; write module:Object")
    return getattr(module, attribute)
