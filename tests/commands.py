"""Runs packpipe's commands in this process, and tells what they print."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from packpipe.cli.main import app


def run(*arguments: Any) -> Any:
    """Return what came of a command."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def told(*arguments: Any) -> str:
    """Return what a command that is fine has printed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
