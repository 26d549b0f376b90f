"""The site, strictly: pages laid out for Zensical, built, and every link of them followed.

Pages are read in the repository, too: there they link to its files, and say ``{{ help NAME }}``
where the site has what the command prints. Notebooks become pages, their pictures files. Run as
``python docs/render.py [FOLDER]``; FOLDER holds ``zensical.toml`` and ``pages``.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote, urlsplit


def main(folder: Path) -> None:
    """Build the site of a folder, or raise if anything is wrong with it."""
    import zensical

    pages = folder / "build"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(folder / "pages", pages)
    for path in pages.rglob("*.md"):
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in pages.rglob("*.ipynb"):
        lay_notebook(path)
    warned = BufferingHandler(capacity=1_000_000)  # strict is about pages, not about docstrings
    warned.setLevel(logging.WARNING)
    logging.getLogger().addHandler(warned)
    zensical.build(str(folder.resolve() / "zensical.toml"), {"clean": True, "strict": True})
    wrong = [record.getMessage() for record in warned.buffer]
    if wrong := wrong + faults(folder / "site"):
        raise ValueError("\n".join(wrong))


def page(markdown: str) -> str:
    """Put each command's help in its place, and lead links to what lies beside the page here.

    A picture leads to itself, large.

    >>> page("![rows](rows.png)")
    '[![rows](rows.png)](rows.png)'
    >>> page("[figures](../../benchmarks/results/gpu.md), [a notebook](../../notebooks/04.ipynb)")
    '[figures](results/gpu.md), [a notebook](notebooks/04.md)'
    """
    markdown = re.sub(r"\]\(\.\./\.\./(?:benchmarks/)?(results|notebooks)/", r"](\1/", markdown)
    markdown = re.sub(r"(\]\([^)]*)\.ipynb\)", r"\1.md)", markdown)
    markdown = markdown.replace("](../docs/pages/", "](../")
    markdown = re.sub(r"^(!\[[^\]]*\]\((.+)\))$", r"[\1](\2)", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\{\{ help ?(\S*) \}\}", lambda found: help_of(found[1]), markdown)
    return whole(markdown)


def whole(markdown: str) -> str:
    r"""Mark short code with an option in it, which a line may not end within, behind its hyphens.

    >>> whole("with `train --val 0.1`")
    'with `train --val 0.1`{ .whole }'
    """
    block_or_code = r"^ *```.*?^ *```$|`[^`\n]{1,28}`"

    def marked(found: re.Match[str]) -> str:
        code = found[0]
        return code if "--" not in code or "```" in code else f"{code}{{ .whole }}"

    return re.sub(block_or_code, marked, markdown, flags=re.DOTALL | re.MULTILINE)


def help_of(name: str) -> str:
    """Return in Markdown what a command's ``--help`` says, or that of all if none is named."""
    from typer.main import get_command

    from packpipe.cli.main import app

    program: Any = get_command(app)
    command = program.commands[name] if name else program
    first = {
        f"[{each}](#{each})": found.help.split("\n\n")[0]
        for each, found in program.commands.items()
    }
    arguments = [found for found in command.params if found.param_type_name == "argument"]
    options = [found for found in command.params if found.param_type_name == "option"]
    called = ["packpipe", name or "COMMAND", *(found.name.upper() for found in arguments)]
    examples = (command.epilog or "").removeprefix("[b]Examples[/b]").split("\n\n")
    described = {f"`{spelled(found)}`": meaning(found) for found in options}
    parts = [
        f"`{' '.join(called)} [OPTIONS]`",
        command.help,
        "" if name else table("command", "what it does", first),
        table(
            "argument",
            "meaning",
            {f"`{found.name.upper()}`": meaning(found) for found in arguments},
        ),
        table("option", "meaning [default]", described),
        "\n".join(["```console", *filter(None, examples), "```"]) if command.epilog else "",
    ]
    return "\n\n".join(filter(None, parts))


def spelled(option: Any) -> str:
    """Return an option's names and the kinds of its values: ``--sides INT INT``."""
    kind = option.type_descriptor.annotation
    kinds = [] if option.is_flag else list(get_args(kind)) or [kind]
    return " ".join(
        ["/".join(option.opts + option.secondary_opts), *(each.__name__.upper() for each in kinds)]
    )


def meaning(parameter: Any) -> str:
    """Return a parameter's help, with its default where it has one."""
    default, said = parameter.default, parameter.help.replace("\\[", "[")  # escaped for a terminal
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{said}{'' if default is None or default is False else f' [{default}]'}"


def table(name: str, meaning: str, rows: dict[str, str]) -> str:
    r"""Return names and their meanings as a table, or nothing of no rows.

    >>> print(table("option", "meaning", {"`--strategy STR`": "ffd|bfd"}))
    | option | meaning |
    | --- | --- |
    | `--strategy STR` | ffd\|bfd |
    """
    lines = [f"| {name} | {meaning} |", "| --- | --- |"]
    for name, text in rows.items():
        escaped = re.sub(r"([*_`|\[\]<])", r"\\\1", " ".join(text.split()))
        lines.append(f"| {name} | {escaped} |")
    return "\n".join(lines) if rows else ""


def lay_notebook(path: Path) -> None:
    """Put in a notebook's place a page of what it says and prints, and its pictures."""
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    # What was printed now and then is one output, without blank lines between.
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    markdown, resources = exporter.from_filename(str(path))
    path.unlink()
    for name, content in resources["outputs"].items():
        (path.parent / f"{path.stem}_{name}").write_bytes(content)
    markdown = re.sub(
        r"^!\[\w+\]\((output_\w+\.\w+)\)$", rf"![]({path.stem}_\1)", markdown, flags=re.M
    )
    path.with_suffix(".md").write_text(page(markdown), encoding="utf-8")


def faults(site: Path) -> list[str]:
    """Return what is wrong with a site's pages: with links to, from and on them, and with text."""
    pages = {path: Page(path) for path in site.resolve().rglob("*.html") if path.name != "404.html"}
    found = {(path, target(path, each)) for path, page in pages.items() for each in page.links}
    led = {there for here, there in found if there != here}
    return [
        f"{path.relative_to(site.resolve())}: {fault}"
        for path, page in pages.items()
        for fault in [
            *(f"{each} leads nowhere" for each in page.links if not leads(path, each, pages)),
            *(f"{each} is asked of another host" for each in page.parts if urlsplit(each).netloc),
            *(f"{each!r} is Markdown" for each in page.markdown),
            *([] if path in led else ["no page leads here"]),
        ]
    ]


class Page(HTMLParser):
    """The links and the anchors of a page, what is a part of it, and Markdown that is left."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.anchors: set[str] = set()
        self.markdown: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what a tag refers to, and what refers to it."""
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)
                if name == "src" or tag == "link":
                    self.parts.append(value)

    def handle_data(self, data: str) -> None:
        """Take down the fences of blocks, as one in a list leaves that is not deep enough."""
        self.markdown.extend(line.strip() for line in data.splitlines() if "```" in line)


def target(path: Path, link: str) -> Path | None:
    """Return the file that a page's link is to, the page itself too; None if on another host."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    return (path.parent / unquote(parts.path)).resolve() if parts.path else path


def leads(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Return whether a page's link is to another host, or to something that is there."""
    found = target(path, link)
    anchor = unquote(urlsplit(link).fragment)
    if found is None or not (anchor and found in pages):
        return found is None or found.exists()
    return anchor in pages[found].anchors


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
