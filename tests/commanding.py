"""The command line on one of two ranks, which leaves no process group."""

import sys

from two_ranks import assert_no_group_is_left

from packpipe.cli.main import app

if __name__ == "__main__":
    app(sys.argv[1:], standalone_mode=False)
    assert_no_group_is_left()
