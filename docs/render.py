"""The site, strictly: pages laid out for Zensical, built, and every link of them followed.

Pages are read in the repository, too: there they link to its files, and say ``{{ help NAME }}``
where the site has what the command prints. Notebooks become pages, their pictures files. Run as
``python docs/render.py [FOLDER]``; FOLDER holds ``zensical.toml`` and ``pages``.
"""

from __future__ import annotations

import re
import shutil
import sys
from html.parser import HTMLParser
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
    zensical.build(str(folder.resolve() / "zensical.toml"), {"clean": True, "strict": True})
    if broken := broken_links(folder / "site"):
        raise ValueError("\n".join(broken))


def page(markdown: str) -> str:
    """Put each command's help in its place, and lead links to what lies beside the page here.

    >>> page("[figures](../../benchmarks/results/gpu.md), [a notebook](../../notebooks/04.ipynb)")
    '[figures](results/gpu.md), [a notebook](notebooks/04.md)'
    """
    markdown = re.sub(r"\]\(\.\./\.\./(?:benchmarks/)?(results|notebooks)/", r"](\1/", markdown)
    markdown = re.sub(r"(\]\([^)]*)\.ipynb\)", r"\1.md)", markdown)
    return re.sub(r"\{\{ help ?(\S*) \}\}", lambda found: help_of(found[1]), markdown)


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
    parts = [
        f"`{' '.join(called)} [OPTIONS]`",
        command.help,
        "" if name else table("command", first),
        table("argument", {f"`{found.name.upper()}`": meaning(found) for found in arguments}),
        table("option", {f"`{spelled(found)}`": meaning(found) for found in options}),
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
    return f"{said}{'' if default is None or default is False else f' [{default}]'}"


def table(head: str, rows: dict[str, str]) -> str:
    r"""Return names and their meanings as a table, or nothing of no rows.

    >>> print(table("option", {"`--strategy STR`": "ffd|bfd"}))
    | option |  |
    | --- | --- |
    | `--strategy STR` | ffd\|bfd |
    """
    lines = [f"| {head} |  |", "| --- | --- |"]
    for name, text in rows.items():
        escaped = re.sub(r"([*_`|\[\]<])", r"\\\1", " ".join(text.split()))
        lines.append(f"| {name} | {escaped} |")
    return "\n".join(lines) if rows else ""


def lay_notebook(path: Path) -> None:
    """Put in a notebook's place a page of what it says and prints, and its pictures."""
    from nbconvert import MarkdownExporter

    markdown, resources = MarkdownExporter().from_filename(str(path))
    path.unlink()
    for name, content in resources["outputs"].items():
        (path.parent / f"{path.stem}_{name}").write_bytes(content)
    markdown = re.sub(
        r"^!\[\w+\]\((output_\w+\.\w+)\)$", rf"![]({path.stem}_\1)", markdown, flags=re.M
    )
    path.with_suffix(".md").write_text(page(markdown), encoding="utf-8")


def broken_links(site: Path) -> list[str]:
    """Return the links and pictures of a site's pages that lead nowhere within it."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    return [
        f"{path.relative_to(site)}: {link} leads nowhere"
        for path, page in pages.items()
        for link in page.links
        if path.name != "404.html" and not leads_somewhere(path, link, pages)
    ]


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what a tag refers to, and what refers to it."""
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


def leads_somewhere(path: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Return whether a page's link is to another host, or to something that is there."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
