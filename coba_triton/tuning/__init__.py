"""Launch parameters: ``tables.py`` looks them up, ``tuner.py`` measures them."""

from .tables import explain

__all__ = ["explain"]
