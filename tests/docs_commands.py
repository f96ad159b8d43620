"""Command lines of README, docs and the head comments of configs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
PROGRAMS = ("python", "bash")
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:python|bash) [^`]+)`")
_HEAD = re.compile(r"(?:^#|  )  +((?:python|bash) .*)|  ((?:python|bash) .*)")


@dataclass(frozen=True)
class Command:
    """One command line: its words without comments, where it stands, and the ``export`` lines above it on its page."""

    words: tuple[str, ...]
    page: Path
    line: int
    exports: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def program(self) -> str:
        """The program; the script if it is run by python or bash."""
        return self.words[1] if self.words[0] in PROGRAMS else self.words[0]


def commands() -> list[Command]:
    """Return the command lines of all pages and configs, in order of their lines."""
    return [command for page in PAGES for command in of_page(page)] + [
        command for config in sorted(ROOT.glob("configs/**/*.yaml")) for command in of_config(config)
    ]


def of_page(page: Path) -> list[Command]:
    """Return the command lines in blocks of ``bash``, and those in running text that begin with python or bash."""
    text, found = page.read_text(), []
    for fence in _FENCE.finditer(text):
        if fence[1] == "bash":
            found += _of_lines(fence[2], page, _line(text, fence.start(2)))
    plain = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for code in _INLINE.finditer(plain):
        found.append(Command(_words(code[1].replace("\n", " ")), page, _line(plain, code.start())))
    exports, ordered = [], sorted(found, key=lambda command: command.line)
    for number, command in enumerate(ordered):
        ordered[number] = replace(command, exports=tuple(exports))
        exports += command.words[1:] if command.words[0] == "export" else ()
    return ordered


def of_config(path: Path) -> list[Command]:
    """Return the command lines in the comment at the top of a config."""
    head = re.match(r"(?:#.*\n)*", path.read_text())[0].splitlines()
    found = []
    for number, line in enumerate(head):
        if start := _HEAD.search(line):
            text = "\n".join([start[1] or start[2], *(after.removeprefix("#") for after in head[number + 1 :])])
            found.append(replace(next(_of_lines(text, path, number + 1)), exports=("DATA_ROOT=data",)))
    return found


def data_blocks(page: Path) -> list[tuple[int, str, str]]:
    """Return line, language and text of the blocks of a page that are no commands."""
    text = page.read_text()
    return [(_line(text, fence.start()), fence[1], fence[2]) for fence in _FENCE.finditer(text) if fence[1] != "bash"]


def _of_lines(text: str, page: Path, first: int) -> Iterator[Command]:
    """Yield the commands of a block that starts in line ``first``; lines that end in a backslash continue."""
    parts, start = [], first
    for number, line in enumerate(text.splitlines(), start=first):
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            if words := _words(" ".join(parts)):
                yield Command(words, page, start)
            parts, start = [], number + 1


def _words(line: str) -> tuple[str, ...]:
    return tuple(shlex.split(line, comments=True))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
