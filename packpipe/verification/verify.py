"""`verify`: checks that a folder is as `pack` wrote it and holds every example once.

All that can be computed again is compared with what the folder says: checksums, counts and fill,
tokens with their segments (`row_checks`), rows with the plan (`plan_checks`), and all of it with
the source, if it is given. A file with a wrong checksum is not opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from packpipe import checks
from packpipe.building.opened import PAIR
from packpipe.building.shards import MANIFEST, REJECTS, record_of
from packpipe.packing.quality import fill
from packpipe.planning.epoch_plan import EpochPlan
from packpipe.rows.rejects import Reject
from packpipe.rows.rows import Rows
from packpipe.verification.copy_for_check import copy_for_check
from packpipe.verification.folder import Opened, read_folder
from packpipe.verification.image_checks import ImageChecks
from packpipe.verification.manifest import job_problems, sidecar_problems
from packpipe.verification.plan_checks import plan_problems
from packpipe.verification.problems import Problem, named, same_json
from packpipe.verification.reject_checks import order_problems
from packpipe.verification.row_checks import Again, RowChecks
from packpipe.verification.token_checks import TokenChecks

_COUNTS = ("read", "packed", "rejected", "rejected_by_reason", "packs", "bound", "tokens")
_Returned = TypeVar("_Returned")


def verify(
    folder: str | Path,
    dataset: Dataset | None = None,
    *,
    sample: int | None = 100,
    storage_options: dict[str, Any] | None = None,
    cache: str | Path | None = None,
) -> list[Problem]:
    """Return what is wrong with the folder of a packed dataset; an empty list if nothing is.

    Every checksum, row and count is checked; that each source example is in exactly one row or in
    the rejects; and that each row holds what the plan, made again, puts there. Given the source,
    all labels, weights and sizes (from the headers of all images), all pieces of sequences and all
    rejects are compared with it, and some images, and their masks, are decoded again and compared
    with their tokens; where rows hold encoded images, these are compared with the source's as they
    are. Takes about as long as reading the files, and with the source its headers.

    What nothing else in a folder tells is not seen: labels, weights, pixels, targets, tokens, and
    what is said of rejects, without the source; pixels and targets outside the sample; the
    versions, paths and fingerprints that the manifest names, if ``state.json`` has their digest,
    and an option that makes no difference to these rows, such as one of pixels where rows have none
    (encoded images, or none at all); how many colour profiles could not be used; and where rows are
    cut into files.

    Args:
        folder: the folder that `pack` or `pack_pairs` was given as ``output``. Of `pack_pairs`,
            rows of texts alone are not compared with a plan, which is that of the images; rows of
            images alone need the source for it. Of a folder in a store, its URL: all files are
            copied into the cache meanwhile, which takes room for them: copies that nobody holds
            are removed for it.
        dataset: the dataset that was packed; None checks the folder alone.
        sample: how many images of dataset are decoded again; None for all.
        storage_options: for fsspec, of a URL: credentials, for example.
        cache: of a URL, a local folder for the copy, as of `open_packed`.

    Raises:
        TypeError: an argument has the wrong type.
        ConnectionError: the store does not answer.
        OSError: there is no room for a copy of a folder in a store.
        ValueError: folder is not a folder, sample is negative, or the images of dataset are decoded
            with a package that is not installed.
    """
    remedy = "pass the folder that pack was given as output"
    if not isinstance(folder, str | Path):
        raise TypeError(checks.sentence("folder", folder, "a path", remedy))
    place = checks.url_or_path("folder", folder)
    is_remote = checks.has_scheme(place)
    if not is_remote and not Path(place).is_dir():
        raise ValueError(checks.sentence("folder", str(folder), "a folder", remedy))
    if dataset is not None and not isinstance(dataset, Dataset):
        remedy = (
            "pass the dataset that was packed; of ImageFiles, load their files with "
            "datasets.load_dataset('parquet', data_files=[*files.files], split='train')"
        )
        raise TypeError(checks.sentence("type(dataset)", type(dataset).__name__, "Dataset", remedy))
    if dataset is not None:
        checks.untransformed("dataset", dataset)
    if sample is not None:
        sample = checks.whole_number("sample", sample, 0, 2**62, "None takes all images")
    if not is_remote:
        return list(_problems(Path(place), dataset, sample))
    with copy_for_check(place, storage_options, cache) as copy:
        return list(_problems(copy, dataset, sample))


def _problems(folder: Path, dataset: Dataset | None, sample: int | None) -> Iterator[Problem]:
    if not (folder / MANIFEST).exists() and all((folder / name).is_dir() for name in PAIR):
        yield from _pair_problems(folder, dataset, sample)
        return
    opened = yield from read_folder(folder)
    if opened is not None:
        yield from _content_problems(opened, dataset, sample)


def _pair_problems(folder: Path, dataset: Dataset | None, sample: int | None) -> Iterator[Problem]:
    """Check both folders of `pack_pairs`, and that they belong together."""
    images = yield from _within(PAIR[0], read_folder(folder / PAIR[0]))
    texts = yield from _within(PAIR[1], read_folder(folder / PAIR[1]))
    for name, opened, kind in ((PAIR[0], images, ImageChecks), (PAIR[1], texts, TokenChecks)):
        if opened is not None and not isinstance(opened.checks, kind):
            yield Problem(name, f"holds no rows of {name}")
            return
    lens = None
    if texts is not None and texts.found.whole:
        lens = _lens_by_example(texts.found.held())
    again = None
    if images is not None:
        of_images = _content_problems(images, dataset, sample, lens)
        again = yield from _within(PAIR[0], of_images)
    if texts is None:
        return
    plan = None if again is None else cast(EpochPlan, again.plan)
    yield from _within(PAIR[1], _content_problems(texts, dataset, sample, plan))
    if images is None:
        return
    record = record_of(texts.manifest)
    # Written from one call: each says of the other what its own rows depend on.
    longest, beside = record.pop("longest", None), record.pop("beside", None)
    if not same_json(images.manifest.get("beside"), {**record, "max_text": longest}):
        yield Problem(f"{PAIR[0]}/{MANIFEST}", "beside names other texts than those beside it")
    if plan is not None and beside != plan.fingerprint:
        what = f"beside is {beside!r}, expected {plan.fingerprint!r}, the plan of the images"
        yield Problem(f"{PAIR[1]}/{MANIFEST}", what)
    if images.rejects is not None and texts.rejects is not None:
        # A text stays if its image cannot be decoded.
        planned = [reject for reject in images.rejects if reject.stage != "decode"]
        if planned != texts.rejects:
            what = "are not those of the images that have no row either"
            yield Problem(f"{PAIR[1]}/{REJECTS}", what)


def _within(
    name: str, found: Generator[Problem, None, _Returned]
) -> Generator[Problem, None, _Returned]:
    """Yield problems of a folder within another, with its name; return what they return."""
    while True:
        try:
            problem = next(found)
        except StopIteration as end:
            returned: _Returned = end.value
            return returned
        yield problem._replace(where=f"{name}/{problem.where}")


def _lens_by_example(held: Rows) -> NDArray[np.int64] | None:
    """Return int64[examples], the tokens of each; None if they are not rows of a source."""
    examples = held.example_index
    # An index may be anything in a broken folder; those of a source are as many as its examples.
    if len(examples) and not 0 <= examples.min() <= examples.max() < 2**31:
        return None
    lens = np.zeros(examples.max(initial=-1) + 1, np.int64)
    lens[examples] = held.seq_lens
    return lens


def _content_problems(
    opened: Opened, dataset: Dataset | None, sample: int | None, beside: Any = None
) -> Generator[Problem, None, Again | None]:
    """Yield what is wrong with all files together, and beside the source; return the plan.

    Args:
        opened: the folder.
        dataset: the source, or None.
        sample: how many images are decoded again.
        beside: what the plan needs of the other folder of `pack_pairs`.
    """
    row_checks, found, rejects = opened.checks, opened.found, opened.rejects
    # Counts and the files that `datasets` opens are written at the end of a build.
    if not opened.manifest["complete"]:
        what = "says that the build is not complete; call pack again, and it continues"
        yield Problem(MANIFEST, what)
        return None
    again: Again | None = None
    counts: dict[str, Any] = {}
    whole = found.whole and rejects is not None  # totals need all files
    if found.whole and rejects is not None:
        held = found.held()
        amiss = [
            *_partition_problems(opened.manifest, held, rejects, row_checks.views()),
            *row_checks.total_problems(held, rejects),
        ]
        yield from amiss
        yield from order_problems(rejects, row_checks.stages())
        if not amiss:  # an example that is there twice, or in odd pieces, has no plan
            if beside is None and dataset is not None:
                beside = row_checks.beside_from(dataset)
            again = yield from plan_problems(row_checks, found, held, rejects, beside)
        counts = _counts(held, rejects, row_checks.views()) | row_checks.counts(held)
        counts |= {} if again is None else again.counts
    if dataset is not None:
        counts |= yield from _source_problems(opened, dataset, sample)
    if whole:
        yield from _count_problems(row_checks, counts)
        yield from sidecar_problems(opened.folder, opened.manifest, found)
        yield from job_problems(opened.folder, opened.manifest)
    return again


def _partition_problems(
    manifest: dict[str, Any], held: Rows, rejects: list[Reject], views: int
) -> Iterator[Problem]:
    """Yield the examples that are missing, there twice, or none of the source.

    Args:
        manifest: of the folder.
        held: the rows.
        rejects: of the folder.
        views: segments of each image. All of them are in rows, or the image is among the rejects;
            some of them may be in rows there, too, if others could not be decoded.
    """
    rejected = np.array([reject.example_index for reject in rejects], np.int64)
    if views == 1:
        yield from _once_problems(manifest, _packed(held), rejected)
        return
    lost = np.array([one.example_index for one in rejects if one.stage == "decode"], np.int64)
    of_view = [held.example_index[held.views == view] for view in range(views)]
    for view, packed in enumerate(of_view):
        others = np.setdiff1d(rejected, np.intersect1d(lost, packed))
        for problem in _once_problems(manifest, packed, others):
            yield problem._replace(where=f"{problem.where}, view {view}")
    whole = lost[np.all([np.isin(lost, packed) for packed in of_view], axis=0)]
    if len(whole):
        what = "is in the rejects, and all of its views are in rows"
        yield Problem(named("example", whole.tolist()), what)


def _once_problems(
    manifest: dict[str, Any], packed: NDArray[np.int64], rejected: NDArray[np.int64]
) -> Iterator[Problem]:
    """Yield the examples that are not once among those that are packed and those rejected."""
    every = np.concatenate([packed, rejected])
    # A count may be anything; what is too many is said of the count, not of each example.
    num_examples = min(manifest["counts"].get("read", 0), 2 * len(every) + 1000)
    # np.bincount refuses negative numbers, and takes memory for as many as the largest one.
    inside = every[(every >= 0) & (every < num_examples)]
    times = np.bincount(inside, minlength=num_examples)
    for what, examples in (
        ("is in no row and not in the rejects", np.flatnonzero(times == 0)),
        ("is in more than one row, or in a row and in the rejects", np.flatnonzero(times > 1)),
        ("is none of the source", np.setdiff1d(every, inside)),
    ):
        if len(examples):
            yield Problem(named("example", examples.tolist()), what)


def _packed(held: Rows) -> NDArray[np.int64]:
    """Return the examples in rows; a sequence in several pieces once, by its first piece."""
    found: NDArray[np.int64] = held.example_index
    return found[held.fragment == 0] if held.of_tokens else found


def _counts(held: Rows, rejects: list[Reject], views: int) -> dict[str, Any]:
    """Return the manifest's counts that rows and rejects tell by themselves."""
    packed = len(_packed(held))
    if views > 1:  # of an example in the rejects some views may be in rows
        rejected = [reject.example_index for reject in rejects]
        packed = len(np.setdiff1d(held.example_index, rejected))
    return {
        "read": packed + len(rejects),
        "packed": packed,
        "rejected": len(rejects),
        "rejected_by_reason": dict(Counter(reject.reason for reject in rejects)),
        "packs": len(held),
        "tokens": int(held.seq_lens.sum(dtype=np.int64)),
    }


def _count_problems(row_checks: RowChecks, expected: dict[str, Any]) -> Iterator[Problem]:
    """Yield which counts of the manifest are not those that were found."""
    manifest, counts = row_checks.manifest, row_checks.manifest["counts"]
    for name, number in expected.items():
        if not same_json(counts.get(name), number):
            yield Problem(MANIFEST, f"counts.{name} is {counts.get(name)!r}, expected {number!r}")
    known = {*_COUNTS, *row_checks.counted()}
    for name in sorted(counts.keys() - known):
        yield Problem(MANIFEST, f"counts.{name} is {counts[name]!r}, expected none")
    for name in sorted(known - expected.keys()):
        # Only the source tells, or a plan that cannot be made.
        found = counts.get(name)
        if type(found) is not int or found < 0:
            yield Problem(MANIFEST, f"counts.{name} is {found!r}, expected a whole number")
    share = fill(expected["tokens"], expected["packs"], row_checks.config.seq_len)
    if not same_json(manifest["fill"], share):
        yield Problem(MANIFEST, f"fill is {manifest['fill']!r}, expected {share!r}")


def _source_problems(
    opened: Opened, dataset: Dataset, sample: int | None
) -> Generator[Problem, None, dict[str, int]]:
    """Yield how rows differ from the dataset they were made from."""
    expected = opened.manifest["counts"].get("read")
    if len(dataset) != expected:
        yield Problem("dataset", f"holds {len(dataset)} examples, expected {expected}")
        return {}
    for column in opened.checks.source_columns():
        if column not in dataset.column_names:
            yield Problem("dataset", f"has no column {column!r}")
            return {}
    of_source = opened.checks.source_problems(dataset, sample, opened.found, opened.rejects)
    return (yield from of_source)
