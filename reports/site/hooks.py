"""What mkdocs calls while it builds the site: generated tables, commands that are run, equations as MathML.

A page holds three kinds of markers. `<!-- generated: NAME -->` becomes a table of `generators.tables`; a fence `run`
becomes its commands with what they print (`generators.examples`); a fence `math` becomes MathML, which browsers draw.
"""

import re
from pathlib import Path
from typing import Any

from generators import equations, examples, tables

_MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Adds the fence `math`."""
    fence = {"name": "math", "class": "math", "format": equations.fence}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    inline = {"name": "math", "class": "math", "format": equations.inline}
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [inline]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its tables filled in and its commands run."""
    filled = _MARKER.sub(lambda match: tables.table(match[1]), markdown)
    return examples.played(filled, page.file.src_uri, Path(page.file.abs_dest_path).parent)
