"""``python -m packpipe``: the command line (floor 3)."""

from packpipe.cli import app

if __name__ == "__main__":
    app(prog_name="packpipe")
