"""A user's own objects, named by a setting as ``module:Object``."""

import importlib
import os
import sys
from typing import Any

from t3d.common.errors import UserError


def load_object(name: str, key: str) -> Any:
    """The object ``my_package.my_module:Object``; modules of the working folder are found too.

    Raises:
        UserError: no such module or object, or the module fails on import; ``key`` is the setting at fault.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}={name}: cannot be loaded ({reason}); write my_module:MyClass", key) from error
