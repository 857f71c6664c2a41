"""LaTeX as MathML, which browsers draw without a script or a font from the network."""

from typing import Any

import latex2mathml.converter


def fence(source: str, *_: Any, **__: Any) -> str:
    """A block of equations, one to a line; a line that ends in a backslash goes on in the next."""
    lines = [line for line in source.replace("\\\n", " ").splitlines() if line.strip()]
    drawn = [latex2mathml.converter.convert(line, display="block") for line in lines]
    return f'<div class="math">{"".join(drawn)}</div>'


def inline(source: str, *_: Any, **__: Any) -> str:
    """One expression within a line."""
    return latex2mathml.converter.convert(source)
