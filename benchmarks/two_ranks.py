"""Train as two ranks on images of which some are broken, and as one process; print how they differ.

    python benchmarks/two_ranks.py --steps 200

Every tenth pack is a single image that is cut in its scan, so that a rank takes its step without a
token. Two gloo ranks take one pack a step each, one process two; weights are float64. Runs:
`tests/broken.py`, one for every `tail`, and one of fewer packs than ranks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [f"{Path(__file__).parent.parent / 'tests'}"]

import broken  # noqa: E402
from two_ranks import run_on_two_ranks  # noqa: E402


def main() -> None:
    """Run them, and print a row a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(
        "| run | steps | of them without a token, both ranks | largest difference of a loss | of a "
        "weight |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        run_on_two_ranks(broken.__file__, folder, options.steps)
        for name, empty, of_losses, of_weights in broken.compared(folder, options.steps):
            print(f"| {name} | {options.steps} | {empty} | {of_losses:.1e} | {of_weights:.1e} |")


if __name__ == "__main__":
    main()
