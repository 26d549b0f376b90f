"""Docstrings as the site shows them: examples as blocks of code, simple tables as tables."""

from __future__ import annotations

import re
from typing import Any

import griffe

BORDER = re.compile(r"=+( +=+)+")
SECTION = re.compile(r"(Args|Attributes|Raises):\n")
# Several names with one meaning, of which the parser would make one name and its type.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+)(:(?: .*)?(?:\n\1 .*)*)", re.MULTILINE)


class Blocks(griffe.Extension):
    """Rewrites what Markdown would take for quotations and running text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring, paragraph by paragraph."""
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(rendered, paragraphs))


def rendered(paragraph: str) -> str:
    r"""Return a paragraph, an example as a fenced block and a table of reST as one of Markdown.

    >>> rendered(">>> 1 + 1").splitlines()
    ['```pycon', '>>> 1 + 1', '```']
    >>> rendered("Raises:\n    TypeError, ValueError: it is wrong.").splitlines()
    ['Raises:', '    TypeError: it is wrong.', '    ValueError: it is wrong.']
    >>> rendered("It is this::")
    'It is this:'
    >>> table(["=== ==", "a   is", "    b", "=== =="]).splitlines()[2:]
    ['| a | is b |']
    >>> table(["=== ==", "h   i", "=== ==", "a   is", "=== =="]).splitlines()
    ['| h | i |', '| --- | --- |', '| a | is |']
    """
    lines = paragraph.strip("\n").splitlines()
    if paragraph.startswith(">>> "):
        return "\n".join(["```pycon", *lines, "```"])
    if lines and BORDER.fullmatch(lines[0]) and BORDER.fullmatch(lines[-1]):
        return table(lines)
    if SECTION.match(paragraph):
        return SEVERAL.sub(each_alone, paragraph)
    return re.sub("::$", ":", paragraph).removeprefix(":")


def each_alone(found: re.Match[str]) -> str:
    """Return what several names mean, once a name."""
    indent, names, meaning = found.groups()
    return "\n".join(f"{indent}{name}{meaning}" for name in names.split(", "))


def table(lines: list[str]) -> str:
    """Return a simple table of reST, borders first, last and maybe below its head, in Markdown."""
    starts = [found.start() for found in re.finditer("=+", lines[0])]
    headed = lines[2] == lines[0]
    rows: list[list[str]] = [] if headed else [[""] * len(starts)]
    for line in [each for each in lines if each != lines[0]]:
        cells = [
            line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        if cells[0]:
            rows.append(cells)
        else:  # what goes on below
            rows[-1] = [
                f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)
            ]
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
