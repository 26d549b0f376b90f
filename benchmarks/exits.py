"""Run each two-rank script many times beside busy processes, and count the runs that fail.

A rank that aborts when Python ends does so in some runs only, on some machines only.

    python benchmarks/exits.py --runs 60 --busy 2 --jobs 2

The two ranks are started as torchrun starts them, by environment variables, but without torchrun,
which takes as long as both.

`--checkout` takes the scripts and the package of another checkout: the count before a change.
Prints a line a script: its failures of its runs, the exit statuses, and the last words of each
kind of failure.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TRAIN = ["--model", "Ti/32", "--seq-len", "64", "--sides", "32", "128", "--batch-size", "1"]
TRAIN += ["--num-workers", "1", "--steps", "3", "--log-every", "1"]
SCRIPTS = ("softmax", "sigmoid", "accelerate", "lightning", "learning", "packpipe train")


def command(script: str, checkout: Path, folder: Path) -> list[str]:
    """Return what Python is told to run."""
    tests = checkout / "tests"
    return {
        "softmax": [f"{tests}/contrasting.py", "softmax", f"{folder}"],
        "sigmoid": [f"{tests}/contrasting.py", "sigmoid", f"{folder}"],
        "accelerate": [f"{tests}/frameworks.py", "accelerate", f"{folder}"],
        "lightning": [f"{tests}/frameworks.py", "lightning", f"{folder}"],
        "learning": [f"{tests}/learning.py", f"{folder}", "1"],
        "packpipe train": ["-m", "packpipe", "train", "IMAGES", f"{folder}/run", *TRAIN],
    }[script]


def environment_of(checkout: Path) -> dict[str, str]:
    """Return the environment in which the package and the scripts are those of a checkout."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "tests")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def packed_rows(checkout: Path, folder: Path) -> None:
    """Pack the rows that the ranks read: one process at a time writes a folder."""
    make = "import loading, pathlib; loading.packs_of('stored', pathlib.Path.cwd(), epochs=2)"
    command = [sys.executable, "-W", "ignore", "-c", make]
    subprocess.run(command, env=environment_of(checkout), check=True, cwd=folder)  # noqa: S603


def run(script: str, checkout: Path, packs: Path | None, timeout: float) -> tuple[int, str]:
    """Return the exit status of one run, that of a rank which failed, and what it said last."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        environment = {
            **environment_of(checkout),
            "HF_HOME": f"{folder}/huggingface",
            "TMPDIR": name,
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        free.close()
        if packs:
            shutil.copytree(packs, folder, dirs_exist_ok=True)
        images = str(checkout / "packpipe" / "data" / "images")
        arguments = [images if a == "IMAGES" else a for a in command(script, checkout, folder)]
        ranks = [
            subprocess.Popen(  # noqa: S603
                [sys.executable, "-W", "ignore", *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=(folder / f"said-{rank}").open("w"),
                cwd=folder,
            )
            for rank in range(2)
        ]
        try:
            statuses = [rank.wait(timeout) for rank in ranks]
        except subprocess.TimeoutExpired:
            return 124, f"took more than {timeout:.0f} s"
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        failed = [rank for rank, status in enumerate(statuses) if status]
        if not failed:
            return 0, ""
        lines = (folder / f"said-{failed[0]}").read_text(errors="replace").strip().splitlines()
        return statuses[failed[0]], lines[-1] if lines else ""


def main() -> None:
    """Run what is asked for, and print a row a script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="SCRIPT")
    parser.add_argument("--runs", type=int, default=60, help="of each script")
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a run may take")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent)
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [
        subprocess.Popen(spin)  # noqa: S603
        for _ in range(options.busy)
    ]
    rows = Path(tempfile.mkdtemp())
    try:
        if "lightning" in options.scripts:
            packed_rows(checkout, rows)
        print(
            f"{options.runs} runs each, {options.jobs} at a time, beside {options.busy} busy",
            flush=True,
        )
        print(
            "| script | failed | s a run | exit status | last words |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for script in options.scripts:
            packs = rows if script == "lightning" else None
            began = time.monotonic()
            with ThreadPoolExecutor(options.jobs) as pool:
                each = [
                    pool.submit(run, script, checkout, packs, options.timeout)
                    for _ in range(options.runs)
                ]
                found = [one.result() for one in each]
            seconds = (time.monotonic() - began) / options.runs * options.jobs
            failures = [(status, words) for status, words in found if status]
            counted = collections.Counter(words for _, words in failures)
            print(
                f"| {script} | {len(failures)} of {options.runs} | {seconds:.0f} "
                f"| {sorted({status for status, _ in failures})} "
                f"| {'; '.join(f'{n} x {words}' for words, n in counted.items())} |",
                flush=True,
            )
    finally:
        for one in busy:
            one.kill()
        shutil.rmtree(rows)


if __name__ == "__main__":
    main()
