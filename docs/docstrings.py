"""How docstrings become pages: small, quiet `Source:` and `Note:` lines, and doctests as code.

mkdocstrings loads this file while it collects the package; it never imports the package.
"""

import re
from typing import Any

from griffe import Extension, Object

REMARK = re.compile(r"(?:^|(?<=\S)  +)(Source|Note): (.+(?:\n[^\n]+)*)", re.MULTILINE)


class Quiet(Extension):
    """Give every remark a paragraph and a class of its own."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = quiet(obj.docstring.value)


def quiet(text: str) -> str:
    """A docstring whose remarks and examples Markdown understands."""

    def remark(match: re.Match[str]) -> str:
        kind, words = match[1], " ".join(match[2].split())
        return f"\n\n**{kind}** {words}\n{{: .{kind.lower()} }}"

    return re.sub(r"^Example:$", "Examples:", REMARK.sub(remark, text), flags=re.MULTILINE)
