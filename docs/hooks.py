"""What the site takes from the code, the commands' help, and a check of its links."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError

os.environ.update({"TERMINAL_WIDTH": "96", "NO_COLOR": "1"})


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in place of ``{{ help NAME }}`` what the command prints, and lead links within the site.

    Pages link to files of the repository, where they are read, too; here these lie beside them.
    """
    markdown = re.sub(r"\]\(\.\./\.\./(?:benchmarks/)?(results|notebooks)/", r"](\1/", markdown)
    return re.sub(r"\{\{ help (.*?) \}\}", lambda found: help_of(found[1].split()), markdown)


def help_of(command: list[str]) -> str:
    """Return a command's help as a block."""
    from typer.testing import CliRunner

    from packpipe.cli.main import app

    found = CliRunner().invoke(app, [*command, "--help"], prog_name="packpipe").stdout
    text = "\n".join(line.rstrip() for line in found.strip("\n").splitlines())
    return f"```text\n{text}\n```"


def on_post_build(config: Any) -> None:
    """Raise if a link or a picture of a page, notebooks too, leads nowhere within the site."""
    site = Path(config["site_dir"])
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = [
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        for link in page.links
        if path.name != "404.html" and not leads_somewhere(path, link, pages)
    ]
    if broken:
        raise PluginError("links that lead nowhere:\n" + "\n".join(broken))


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
