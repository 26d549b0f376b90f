"""Errors of commands: one line and an exit status, or with --debug Python's traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from packpipe import checks
from packpipe.cli.output import nobody_reads

_Given = ParamSpec("_Given")
_GOING_ON = ("pack", "train", "embed", "demo")  # commands that keep what they have done
_debug = False  # set by --debug, which stands before the command and is parsed first


def debug(asked: bool) -> None:
    """Set whether errors end a command with their traceback."""
    global _debug
    _debug = asked


def name_of(command: Callable[..., None]) -> str:
    """Return a command's name; ``eval_`` is eval, which is a function of Python's."""
    return command.__name__.removesuffix("_").replace("_", "-")


def one_line_errors(command: Callable[_Given, None]) -> Callable[_Given, None]:
    """Return a command that prints an error as one line and exits with its status."""

    @functools.wraps(command)  # typer reads the options from the signature of what is wrapped
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise  # typer's own ways to end a command
        except KeyboardInterrupt:
            goes_on = "; the same command goes on from here"
            said = goes_on if name_of(command) in _GOING_ON else ""
            typer.echo(f"stopped{said}", err=True)
            raise typer.Exit(130) from None  # 128 + SIGINT, as shells have it
        except Exception as error:
            if isinstance(error, BrokenPipeError) and nobody_reads():
                raise typer.Exit(141) from None  # 128 + SIGPIPE, as shells have it; all is well
            if _debug:
                raise
            typer.echo(f"packpipe {name_of(command)}: {checks.plain(in_a_line(error))}", err=True)
            raise typer.Exit(2 if call_is_wrong(error) else 1) from None

    return run


def in_a_line(error: BaseException) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, ModuleNotFoundError):
        names = {"onnx": "onnx", "ray": "ray", "transformers": "texts"}
        extra = next((e for n, e in names.items() if (error.name or "").startswith(n)), "demo")
        return f"{error.name} is not installed; pip install 'packpipe[{extra}]'"
    said = " ".join(str(error).split())
    # Messages of these read as a sentence; others, such as a KeyError's, need the class beside it.
    named = isinstance(error, ValueError | TypeError | IndexError | OSError) and said
    return said if named else f"{type(error).__name__}: {said}"


def call_is_wrong(error: BaseException) -> bool:
    """Return whether an error lies in the arguments of the call, not in the data."""
    from packpipe.rows.rejects import TooManyRejects

    if isinstance(error, TooManyRejects):  # a ValueError, but one of the data
        return False
    wrong = (
        *(ValueError, TypeError, IndexError),
        *(FileExistsError, FileNotFoundError, ModuleNotFoundError),
    )
    return isinstance(error, wrong)
