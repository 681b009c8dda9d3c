"""Objects that a setting names: a file of one of our packages, or a user's ``module:Object``.

A package of plug-ins holds one object per file. The file's name is the object's name; the class has the same name in
capitals (``entropy_bounded.py`` holds ``EntropyBounded``). A new object needs only a new file.
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
    """The object ``name``: of a file of ``package``, or ``module:Object``, found from the working folder too.

    Raises:
        ValueError: there is none; the text names the reason and the remedy.
    """
    if ":" not in name:
        if name not in names(package):
            raise ValueError(f"must be one of {', '.join(names(package))}, or module:Object")
        module = importlib.import_module(f"{package}.{name}")
        return getattr(module, "".join(part.capitalize() for part in name.split("_")))
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's, and may fail in any way
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"cannot import {module_name} ({type(error).__name__}: {reason}); correct the module or its name"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{module_name} has no {attribute or 'object without a name'}; give module:Object")
    return getattr(module, attribute)
