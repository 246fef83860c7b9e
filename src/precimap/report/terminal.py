"""What a person reads on a terminal: text is shown as it is, and can do nothing to the terminal.

Names of layers, tasks and guards, reasons and paths are the user's, or come from a file that somebody else wrote. Invariant:
none of them is read as rich's markup, and none brings a control character, a line end or a change of writing direction onto
the terminal; each such character is shown as Python writes it (`\\x1b`, `\\n`, `\\u202e`). Texts go through `lines_of`,
cells through `Rows`, everything through a `Terminal`, which escapes what is left. Escaping where each name is printed, the
alternative, is forgotten at the next name.
"""

import errno
import os
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


def shown(text: str) -> str:
    """The text on one line, with every character that a terminal does not print as a letter or a space written out."""
    return _NOT_PRINTABLE.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    character = found.group()
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def lines_of(lines: Iterable[str], style: StyleType = "") -> Text:
    """A line each."""
    return Text("\n".join(shown(line) for line in lines), style=style)


class Rows(Table):
    """A table whose title and cells are shown as they are."""

    def __init__(self, *headers: Any, title: str | None = None, **how: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(shown(title)), **how)

    def add_row(self, *cells: RenderableType | None, **how: Any) -> None:
        super().add_row(*(Text(shown(cell)) if isinstance(cell, str) else cell for cell in cells), **how)


class Terminal(Console):
    """A console without markup, that writes out what nobody did before it."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **how)

    def on_broken_pipe(self) -> None:
        """Where rich would end the program: progress that nobody reads is not printed, a result cannot be."""
        self.quiet = True
        if not self.stderr:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments as rich gives them, their texts escaped; line ends are lines that `lines_of` made."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
            else:
                yield Segment("\n".join(map(shown, text.split("\n"))), style, control)
