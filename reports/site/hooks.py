"""What mkdocs calls while it builds the site: generated tables, commands that are run, equations as MathML.

A page holds three kinds of markers. `<!-- generated: NAME -->` becomes a table of `generators.tables`; a fence `run`
becomes its commands with what they print (`generators.examples`); a fence `math` becomes MathML, which browsers draw.
"""

import os
import re
from pathlib import Path
from typing import Any

from generators import equations, examples, tables
from mkdocs.structure.files import File

_SHIM = (
    "https://unpkg.com/iframe-worker/shim"  # what the theme's offline search asks the network for; ours is in the site
)
_MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Adds the fence `math`."""
    fence = {"name": "math", "class": "math", "format": equations.fence}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    inline = {"name": "math", "class": "math", "format": equations.inline}
    config.mdx_configs.setdefault("pymdownx.inlinehilite", {})["custom_inline"] = [inline]
    return config


def on_files(files: Any, config: Any, **_: Any) -> None:
    """The pictures that the README shows are the site's too."""
    for picture in sorted(Path(config.config_file_path).parents[1].glob("pictures/*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its tables filled in and its commands run."""
    filled = _MARKER.sub(lambda match: tables.table(match[1]), markdown)
    return examples.played(filled, page.file.src_uri, Path(page.file.abs_dest_path).parent)


def on_post_build(config: Any, **_: Any) -> None:
    """Points every page at the site's own copy of the one script that the theme would load from the network."""
    site = Path(config.site_dir)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if _SHIM in text:
            own = os.path.relpath(site / "javascripts" / "iframe-worker.js", page.parent)
            page.write_text(text.replace(_SHIM, own), encoding="utf-8")
