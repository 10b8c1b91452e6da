"""Launch parameters: the tables, and which of them a launch takes."""

from .tables import SPACE, VARIABLE, Choice, TableError, explain, use

__all__ = ["SPACE", "VARIABLE", "Choice", "TableError", "explain", "use"]
