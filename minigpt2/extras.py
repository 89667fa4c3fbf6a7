"""Packages that not everybody needs: extras of this one bring them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingExtra", "import_extra"]


class MissingExtra(ValueError):
    """Something was asked for that needs a package that is not installed. Says how to get it."""


def import_extra(extra: str, module: str, purpose: str) -> Any:
    """The module, which `pip install 'minigpt2[extra]'` brings; MissingExtra, which begins with the purpose, if it
    cannot be imported."""
    try:
        found = importlib.import_module(module)
        if getattr(found, "__file__", "") is None:  # a folder of that name, such as one that wandb writes
            raise ImportError(f"{module} is a folder here, not the package")
    except Exception as error:  # a package that does not fit the others fails with errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingExtra(f"{purpose}: {reason}; pip install 'minigpt2[{extra}]'") from None
    return found
