"""The commands of a page, run while the site is built, with what they really print.

A fence `run` holds commands, one to a line; a fence `file NAME` is shown and written to NAME, where the page's commands
run; `  # first N lines` behind a command shows no more of its output, and `  # exit N` expects that status.
`<!-- written: NAME | WORDS -->` links a page that a command has written. A command that fails fails the build.
COSIM_SITE_RUN=0 leaves commands and their output out, for a quick look at the text.
"""

import html
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_FENCE = re.compile(r"^```(run|file)(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WRITTEN = re.compile(r"<!-- written: (\S+) \| (.+?) -->")
_BACKGROUND, _FOREGROUND = (30, 36, 48), (229, 233, 240)  # as in style.css
_COLORS = [  # black, red, green, yellow, blue, magenta, cyan, white
    *((59, 66, 82), (208, 110, 118), (163, 190, 140), (235, 203, 139)),
    *((129, 161, 193), (180, 142, 173), (136, 192, 208), (229, 233, 240)),
]
_COLUMNS = 98
_FAILURE = re.compile(r"(.*)  # exit (\d+)$")
_FIRST = re.compile(r"(.*)  # first (\d+) lines$")


def played(markdown: str, page: str, site: Path) -> str:
    """The page with its files written, its commands run, and their output under them.

    Pages that the commands write and the text links are put into the folder `site`.
    """
    if not _FENCE.search(markdown):
        return markdown
    with tempfile.TemporaryDirectory() as folder:
        shown = _FENCE.sub(lambda match: _shown(match, Path(folder), page), markdown)
        return _WRITTEN.sub(lambda match: _link(match, Path(folder), site), shown)


def _link(match: re.Match[str], folder: Path, site: Path) -> str:
    name, words = match[1], match[2]
    if not _runs():
        return words
    site.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / name, site / name)
    return f'<a href="{name}">{words}</a>'


def _runs() -> bool:
    return os.environ.get("COSIM_SITE_RUN") != "0"


def _shown(match: re.Match[str], folder: Path, page: str) -> str:
    kind, name, text = match[1], match[2], match[3]
    if kind == "file":
        (folder / name).write_text(text, encoding="utf-8")
        return f'```{Path(name).suffix[1:]} title="{name}"\n{text}```'
    blocks = [_run(line, folder, page) for line in text.splitlines() if line.strip()]
    return "\n\n".join(blocks)


def _run(command: str, folder: Path, page: str) -> str:
    expected = 0
    lines = None
    if first := _FIRST.fullmatch(command):
        command, lines = first[1], int(first[2])
    if failure := _FAILURE.fullmatch(command):
        command, expected = failure[1], int(failure[2])
    prompt = f'<span class="prompt">$</span> <b>{html.escape(command)}</b>\n'
    if not _runs():
        return f'<pre class="terminal">{prompt}</pre>'
    status, printed = _on_a_terminal(command, folder)
    if status != expected:
        raise SystemExit(f"{page}: '{command}' ended with status {status}, not {expected}:\n{printed}")
    return f'<pre class="terminal">{prompt}{_colored(printed, lines)}</pre>'


def _on_a_terminal(command: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of `command`, whose standard output is a terminal; its errors are printed after."""
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
        "COLUMNS": str(_COLUMNS),
        "TERM": "xterm-256color",
    }
    environment.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    chunks: list[bytes] = []
    while chunk := _read(ours):
        chunks.append(chunk)
    os.close(ours)
    _, errors = process.communicate()
    printed = b"".join(chunks) + errors
    return process.returncode, printed.decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


def _colored(printed: str, lines: int | None) -> str:
    """The first lines of terminal output with its colors as HTML.

    A blank line would end the block for Markdown, so it holds a space.
    """
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text

    console = Console(record=True, width=400, file=io.StringIO(), legacy_windows=False)
    console.print(Text.from_ansi(printed), soft_wrap=True, end="")
    theme = TerminalTheme(_BACKGROUND, _FOREGROUND, _COLORS)
    page = console.export_html(theme=theme, inline_styles=True, code_format="{code}")
    shown = [line.rstrip() or " " for line in page.rstrip().splitlines()]
    return "\n".join([*shown[:lines], *(["…"] if lines is not None and len(shown) > lines else [])])
