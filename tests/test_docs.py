"""The documentation site: what the program has is in its references, and a page opens without a network."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import pytest
from pydantic import BaseModel

pytest.importorskip("mkdocs")
pytest.importorskip("material")

SITE = Path(__file__).parents[1] / "reports" / "site"
LOADING = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}


class Page(HTMLParser):
    """Ids, links, what is loaded, and by heading the code in the first cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.keys: set[tuple[str, str]] = set()
        self._heading, self._cell, self._inside = "", 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag != "link" or given.get("rel") not in ("canonical", "next", "prev"):
            self.loads += [given[name] for kind, name in LOADING if kind == tag and name in given]
        if tag in ("h1", "h2", "h3"):
            self._inside, self._heading = "heading", ""
        elif tag == "tr":
            self._cell = 0
        elif tag == "td":
            self._cell += 1
        elif tag == "code" and self._cell == 1:
            self._inside = "key"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "h3"):
            self.headings.append(self._heading)
        if tag in ("h1", "h2", "h3", "code", "a"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "heading":
            self._heading += data.replace("¶", "")
        elif self._inside == "key":
            self.keys.add((self._heading, data))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly, without the commands that its pages run."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"COSIM_SITE_RUN": "0", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", SITE / "mkdocs.yml", "-d", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def keys(pages: dict[Path, Page], name: str) -> set[tuple[str, str]]:
    return next(page for path, page in pages.items() if path.name == f"{name}.html").keys


def fields_of(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """(section, key) of every field below a pydantic model, by its types."""
    for name, field in section.model_fields.items():
        if path:
            yield path, name
        for inner in models_in(field.annotation):
            yield from fields_of(inner, f"{path}.{name}" if path else name)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def test_every_field_of_the_run_file_is_in_its_reference(pages: dict[Path, Page]) -> None:
    from cosim.spec import RunSpec

    shown = {(heading.partition(":")[0], key) for heading, key in keys(pages, "run-file")}
    wanted = set(fields_of(RunSpec))
    assert ("training.recompute", "every") in wanted  # the walk reaches what is nested
    assert wanted - shown == set()


def test_every_fact_of_a_stack_is_in_its_reference(pages: dict[Path, Page]) -> None:
    from cosim.stacks.stack import Stack

    facts = {field.name for field in dataclasses.fields(Stack)} - {"name", "title", "sources", "assumed"}
    assert facts - {key for _, key in keys(pages, "software-stack")} == set()


def test_every_command_and_option_is_in_its_reference(pages: dict[Path, Page]) -> None:
    from cosim import cli

    page = next(page for path, page in pages.items() if path.name == "commands.html")
    groups = {"cosim": cli.app} | {f"cosim {g.name}": g.typer_instance for g in cli.app.registered_groups}
    commands = [
        f"{words} {command.name or command.callback.__name__}"
        for words, group in groups.items()
        for command in group.registered_commands
        if command.callback is not None
    ]
    assert set(commands) - set(page.headings) == set()
    assert ("cosim simulate", "--set A.B=C") in page.keys


def test_every_public_name_is_in_the_python_reference(pages: dict[Path, Page]) -> None:
    import cosim

    page = next(page for path, page in pages.items() if path.name == "python.html")
    assert set(cosim.__all__) - set(page.headings) == set()


def test_every_key_of_an_accelerator_file_is_explained() -> None:
    sys.path.insert(0, str(SITE))
    try:
        from generators import accelerator_file
        from generators.accelerator_meanings import MEANINGS
    finally:
        sys.path.remove(str(SITE))
    read = set(accelerator_file.found())
    assert {"memory.hbm.bandwidth", "links.TIER.bandwidth", "calibration.gemm.efficiency"} <= read
    assert read - set(MEANINGS) == set(), "explain them in reports/site/generators/accelerator_meanings.py"
    assert set(MEANINGS) - read == set(), "nothing reads them any more"


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchored = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids
            if not target.exists() or not anchored:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    loads = [(path.name, link) for path, page in pages.items() for link in page.loads]
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        loads += [(path.name, link) for link in re.findall(r"(?:url\(|@import )['\"]?([^)'\"]*)", text)]
    assert len(loads) > len(pages)
    assert [load for load in loads if re.match(r"(https?:)?//", load[1])] == []
