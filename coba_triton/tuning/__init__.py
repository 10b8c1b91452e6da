"""Launch parameters: the tables, and which of them a launch takes. The tuner is in ``tuner.py``."""

from .tables import explain

__all__ = ["explain"]
