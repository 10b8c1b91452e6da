"""Docstrings as the pages of the site show them: an extension of griffe, which mkdocstrings reads them with.

The docstrings call their section of one example ``Example:`` and name other objects with roles of Sphinx.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class AsMarkdown(griffe.Extension):
    """Sections of examples get the name that griffe knows, and roles become code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # what follows is indented, which is enough
            obj.docstring.value = ROLE.sub(r"`\1`", text)
