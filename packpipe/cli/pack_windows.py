"""`packpipe pack` of files by windows: here, on Ray, or by processes that know no other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from packpipe import checks


def part_of(text: str) -> tuple[int, int]:
    """Return (k, n) of the text "k/n": the k-th of n parts, counted from 1.

    Raises:
        ValueError: it is no such text.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        expected, remedy = "K/N with K in 1..N", "the third of a hundred parts is 3/100"
        raise ValueError(checks.sentence("--part", text, expected, remedy))
    return int(number), int(parts)


def pack_windows(
    source: str,
    output: str,
    seq_len: int,
    options: dict[str, Any],
    limits: tuple[str, float, int],
    *,
    ray: str | None,
    part: str | None,
    finish: bool,
    progress: bool,
    **asked: Any,
) -> dict[str, Any] | None:
    """Pack Parquet files into a folder; return its manifest, None if it is not complete.

    Args:
        source: a file, a folder of them or a pattern, also behind a scheme.
        output: a folder or a URL.
        seq_len: tokens a row holds.
        options: of `PackConfig`.
        limits: on_error, max_bad_fraction and max_consecutive_bad.
        ray: address of a Ray cluster; None builds windows here.
        part: "k/n" builds the k-th of n parts alone, and completes nothing.
        finish: completes the folder after all parts; builds nothing.
        progress: whether to show a progress bar.
        **asked: window_rows, seed, epoch, num_workers, image_seconds, and the names of columns.
    """
    import packpipe
    from packpipe.building.files_build import finished
    from packpipe.building.pack_files import files_build
    from packpipe.rows.rejects import tolerance_of

    if finish and (part is not None or ray is not None):
        expected, remedy = "given alone", "run it once, after all parts"
        raise ValueError(checks.sentence("--finish", True, expected, remedy))
    own = None if part is None else part_of(part)
    files = packpipe.ImageFiles(source)
    tolerance = tolerance_of(len(files), *limits)
    build = files_build(files, seq_len, options, tolerance, output=output, **asked)
    if not build.claim():
        known = None
        if not finish:
            with nullcontext() if ray is None else packpipe.RayExecutor(ray) as executor:
                known = build.run(executor, part=own or (1, 1), progress=progress)
        if own is not None:
            return None
        build.finish(known)
    return finished(build.job.storage)
