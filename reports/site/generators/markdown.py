"""Markdown tables and the few characters that they cannot hold."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are one line of Markdown each."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: object) -> str:
    """`text` as code."""
    return f"`{text}`"


def sentence(text: str) -> str:
    """`text` in one line with a full stop."""
    text = " ".join(text.split())
    return text + ("" if text.endswith((".", "?", "!")) or not text else ".")
