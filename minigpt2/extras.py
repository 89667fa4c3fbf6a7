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
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{purpose}: {error}; pip install 'minigpt2[{extra}]'") from None
