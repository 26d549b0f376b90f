"""``python -m packpipe``: the command line."""

from packpipe.cli.main import app

if __name__ == "__main__":
    app(prog_name="packpipe")
