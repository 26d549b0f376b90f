"""WindowPacks: images in files, planned anew every epoch, window by window."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import re
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import islice

import fsspec
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import windowed
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import packpipe
from packpipe import Crop, EpochPacks, ImageFiles, PackedLoader, Side, Uniform
from packpipe.loading import window_plans
from packpipe.loading.open_windows import OpenWindow
from packpipe.loading.window_packs import WindowPacks
from packpipe.philox import Key
from packpipe.rows.rejects import TooManyRejects

# What draws anew each epoch.
DRAWING = {"resolution": Side(Uniform(4, 12)), "drop_rate": Uniform(0, 0.6), "crop": Crop()}
OPTIONS = {**windowed.OPTIONS, "window_rows": 15, "max_bad_fraction": 1.0, "num_workers": 1}
MANY = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images of one to four patches in 12 blocks; every ninth cannot be decoded."""
    found = tmp_path_factory.mktemp("files")
    windowed.write(found)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """240 images in 30 blocks, so that there are 15 windows of 16."""
    images = [pictures.encoded_image(4 + 4 * (n % 3), 4 + 4 * (n % 2), n) for n in range(30)]
    images = [{"bytes": images[n % 30], "path": None} for n in range(MANY)]
    features = Features({"image": Image(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": images, "label": list(range(MANY))}, features=features)
    path = tmp_path_factory.mktemp("many") / "all.parquet"
    pq.write_table(dataset.data.table.cast(features.arrow_schema), path, row_group_size=8)
    return ImageFiles(path)


def packs_of(folder, cache, **options):
    return WindowPacks(ImageFiles(folder), cache_dir=cache, **{**OPTIONS, **options})


def loader_of(packs, batch_size, **options):
    return PackedLoader(packs, batch_size, as_numpy=True, **options)


def laid_end_to_end(loaders):
    """Every byte of each step, the ranks' batches laid end to end."""
    for parts in zip(*loaders, strict=True):
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        yield [(name, column.shape, column.tobytes()) for name, column in columns.items()]


def steps_of(packs, world_size, size, **options):
    place = {"world_size": world_size, **options}
    ranks = range(world_size)
    loaders = [loader_of(packs, size // world_size, rank=rank, **place) for rank in ranks]
    return list(laid_end_to_end(loaders))


def examples_in(loader):
    """The examples of all batches; the lists of a batch end in what is below zero."""
    return [one for batch in loader for one in batch["example_index"].ravel().tolist() if one >= 0]


@contextmanager
def counted(patch, where, name):
    """Count the calls of a function, by their arguments named ``window`` or the last one."""
    calls, real = [], getattr(where, name)

    def counting(*args, **kwargs):
        calls.append(kwargs.get("window", args[-1] if args else None))
        return real(*args, **kwargs)

    with patch.context() as some:
        some.setattr(where, name, counting)
        yield calls


@pytest.mark.parametrize("key", [(0, 0), (3, 1)])
def test_an_epoch_has_the_rows_that_pack_writes(folder, cache, tmp_path, key):
    options = {**DRAWING, "views": 2, "weight_column": "n"}
    packs = packs_of(folder, cache, **options)
    packed = packpipe.pack(
        ImageFiles(folder),
        output=tmp_path / "rows",
        seed=key[0],
        epoch=key[1],
        progress=False,
        **{**OPTIONS, **options, "num_workers": 0},
    )
    wanted, place = packpipe.read_rows(packed), 0
    windows = packs.windows(Key(*key))
    assert len(windows.blocks) == 4
    for window in range(4):
        opened = packs.opened(Key(*key), window)
        taken = packs.taken(Key(*key), [(opened, np.arange(len(opened.plan)))])
        rows = packs.rows(Key(*key), taken)
        some = packpipe.read_rows(packed, range(place, place + len(rows)))
        assert pictures.row_bytes(rows) == pictures.row_bytes(some)
        assert rows.weight.tolist() == some.weight.tolist()
        assert rows.view.tolist() == some.view.tolist()
        place += len(rows)
    assert place == len(wanted) == packs.num_packs(Key(*key)) > 4


KEYS = st.tuples(st.integers(0, 2), st.integers(0, 2))


@given(
    key=KEYS,
    lanes=st.sampled_from([1, 2, 4, 6]),
    each=st.sampled_from([1, 2]),
    tail=st.sampled_from(["drop", "pad"]),
    window_rows=st.integers(5, 70),
)
@settings(max_examples=5)
def test_an_epoch_holds_every_image_once_on_any_number_of_ranks(
    folder, cache, key, lanes, each, tail, window_rows
):
    packs = packs_of(folder, cache, lanes=lanes, window_rows=window_rows, **DRAWING)
    size, options = lanes * each, {"seed": key[0], "epoch": key[1], "tail": tail}
    alone = steps_of(packs, 1, size, **options)
    num_packs = packs.num_packs(Key(*key))
    assert len(alone) == (-(-num_packs // size) if tail == "pad" else num_packs // size) > 0
    for world_size in {2, lanes}:
        if size % world_size == 0:
            assert steps_of(packs, world_size, size, **options) == alone
    found = Counter(examples_in(loader_of(packs, size, **options)))
    good = [n for n in range(60) if n % 9 != 4]
    assert max(found.values()) == 1
    assert set(found) <= set(good)
    if tail == "pad" or num_packs % size == 0:
        assert sorted(found) == good
    assert {one.example_index for one in packs.undecodable} == set(range(60)) - set(good) or (
        tail == "drop"
    )


@given(
    lanes=st.sampled_from([1, 2, 4]),
    worlds=st.tuples(*[st.sampled_from([1, 2, 4])] * 2),
    stop=st.integers(0, 200),
    tail=st.sampled_from(["drop", "pad"]),
    epoch=st.integers(0, 1),
)
@settings(max_examples=5)
def test_any_state_continues_byte_for_byte_on_another_number_of_ranks(
    folder, cache, lanes, worlds, stop, tail, epoch
):
    packs = packs_of(folder, cache, lanes=lanes, **DRAWING)
    size, options = 4, {"epoch": epoch, "tail": tail, "seed": 1}
    whole = steps_of(packs, 1, size, **options)
    whole += steps_of(packs, 1, size, **{**options, "epoch": epoch + 1})
    first, then = worlds
    stop %= len(whole) - 1
    loaders = [
        loader_of(packs, size // first, rank=rank, world_size=first, **options)
        for rank in range(first)
    ]
    taken = []
    while len(taken) < stop:
        taken += islice(laid_end_to_end(loaders), stop - len(taken))
    states = [json.dumps(loader.state_dict()) for loader in loaders]
    assert len(set(states)) == 1
    again = packs_of(folder, cache, lanes=lanes, **DRAWING)
    loaders = [
        loader_of(again, size // then, rank=rank, world_size=then, **{**options, "epoch": 0})
        for rank in range(then)
    ]
    for loader in loaders:
        loader.load_state_dict(json.loads(states[0]))
    rest = list(laid_end_to_end(loaders))
    if len(taken + rest) < len(whole):
        rest += laid_end_to_end(loaders)
    assert taken + rest == whole


@pytest.mark.parametrize(("lanes", "ranks"), [(1, 1), (4, 1), (4, 2)])
def test_a_pass_resumes_by_planning_a_few_windows_wherever_it_was(
    many, cache, monkeypatch, lanes, ranks
):
    options = {"cache_dir": cache, "patch_size": 4, "window_rows": 16, "num_workers": 1}
    packs = WindowPacks(many, 6, lanes=lanes, **options)
    loader = loader_of(packs, lanes // ranks, rank=0, world_size=ranks)
    num_windows = len(packs.windows(Key(0, 0)).blocks)
    assert num_windows == 15
    assert len(loader) > 120 // lanes
    planned = []
    for step in range(0, len(loader) - 1, len(loader) // 6):
        state = {**loader.state_dict(), "packs": lanes * step, "finished": False}
        again = loader_of(
            WindowPacks(many, 6, lanes=lanes, **options), lanes // ranks, rank=0, world_size=ranks
        )
        with counted(monkeypatch, window_plans, "plan_window") as calls:
            again.load_state_dict(state)
            batches = iter(again)
            next(batches)
            batches.close()
        planned.append(len(calls))
    # The window of each of its lanes, and what is read ahead.
    assert 1 <= max(planned) <= 2 * lanes // ranks


@pytest.mark.parametrize("lanes", [1, 3])
def test_windows_are_planned_and_read_once_an_epoch_and_few_are_held(
    many, tmp_path, monkeypatch, lanes
):
    options = {"cache_dir": tmp_path, "patch_size": 4, "window_rows": 16, "num_workers": 1}
    alive = weakref.WeakSet()
    real = OpenWindow.__init__

    def seen(self, *args, **kwargs):
        real(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(OpenWindow, "__init__", seen)
    with counted(monkeypatch, window_plans, "plan_window") as calls:
        loader = loader_of(WindowPacks(many, 6, lanes=lanes, **options), lanes)
        assert len(loader) > 20
    assert sorted(calls) == list(range(15)), "planned once to count"
    with counted(monkeypatch, window_plans, "plan_window") as calls:
        loader = loader_of(WindowPacks(many, 6, lanes=lanes, **options), lanes)
        held = [len(alive) for _ in loader]
    assert 15 <= len(calls) <= 15 + lanes - 1
    assert set(calls) == set(range(15))
    assert 1 <= max(held) <= 3 * lanes
    gc.collect()
    assert not alive


def test_what_is_taken_holds_its_own_images_and_may_be_sent(many, cache):
    packs = WindowPacks(many, 6, patch_size=4, window_rows=100, cache_dir=cache)
    what = "ImageFiles(1 file, 30 blocks, 240 rows) in rows of 6 tokens"
    assert repr(packs) == f"WindowPacks({what}, 1 lane, 0 rejects)"
    key = Key(0, 0)
    opened = packs.opened(key, 1)
    taken = packs.taken(key, [(opened, np.array([2, 0]))])
    held = taken.images.values
    assert len(held) == len(taken.planned.example_index) < len(opened.plan.index) / 4
    assert held.get_total_buffer_size() < opened.images.values.get_total_buffer_size() / 4
    rows = packs.rows(key, taken)
    sent = pickle.loads(pickle.dumps((packs, taken)))  # noqa: S301
    assert pictures.row_bytes(sent[0].rows(key, sent[1])) == pictures.row_bytes(rows)
    assert len(pickle.dumps(taken)) < 20_000
    assert rows.labels.to_pylist() == rows.example_index.tolist()


def test_epochs_and_seeds_are_others_and_workers_change_nothing(many, cache):
    packs = WindowPacks(many, 6, patch_size=4, window_rows=16, cache_dir=cache, lanes=2)
    loader = loader_of(packs, 4)
    first = examples_in(loader)
    loader.set_epoch(1)
    second = examples_in(loader)
    assert first != second != examples_in(loader_of(packs, 4, seed=1))
    threads = loader_of(packs, 4, num_workers=2)
    assert [examples_in(threads), examples_in(threads)] == [first, second]
    assert len(first) == len(set(first)) > MANY - 40


def test_passes_go_through_epochs_with_threads_that_begin_the_next_one_ahead(many, cache):
    packs = WindowPacks(many, 6, patch_size=4, window_rows=100, cache_dir=cache)
    loader = loader_of(packs, 8, num_workers=2)
    taken = [(key, batch["example_index"].tobytes()) for batch, key in islice(loader.passes(), 40)]
    assert {key.epoch for key, _ in taken} >= {0, 1}
    singles = loader_of(packs, 8)
    wanted = [batch["example_index"].tobytes() for _ in range(2) for batch in singles]
    assert len(wanted) < 40
    assert [found for _, found in taken][: len(wanted)] == wanted


def test_counts_are_kept_and_counted_again_if_they_are_broken(folder, tmp_path, caplog):
    key = Key(0, 0)
    first = packs_of(folder, tmp_path).windows(key)
    (path,) = tmp_path.glob("packpipe-packs-*.npy")
    assert np.load(path).sum() == first.num_packs == first.ends[-1]
    path.write_bytes(path.read_bytes()[:-8])
    assert packs_of(folder, tmp_path).windows(key).ends.tolist() == first.ends.tolist()
    assert "is broken" in caplog.text
    path.write_bytes(b"")
    assert packs_of(folder, tmp_path).windows(key).ends.tolist() == first.ends.tolist()
    # One that is whole, but of another plan.
    np.save(path, np.load(path) + 1)
    said = re.escape("expected ") + r"\d+, as counted; the sizes or counts were changed: remove "
    with pytest.raises(ValueError, match=said + re.escape(str(path))):
        packs_of(folder, tmp_path).opened(key, 2)


def test_files_behind_a_scheme_give_the_same_batches(folder, cache):
    store = fsspec.filesystem("memory")
    for path in folder.glob("*.parquet"):
        store.pipe_file(f"/windows/{path.name}", path.read_bytes())
    remote, local = packs_of("memory://windows", cache, lanes=2), packs_of(folder, cache, lanes=2)
    assert remote.fingerprint(Key(0, 0)) == local.fingerprint(Key(0, 0))
    assert steps_of(remote, 1, 4) == steps_of(local, 1, 4) != []
    sent = pickle.loads(pickle.dumps(loader_of(remote, 4)))  # noqa: S301
    assert list(laid_end_to_end([sent])) == steps_of(local, 1, 4)


def test_masks_become_targets(tmp_path):
    rng = np.random.default_rng(3)
    masks = [rng.integers(0, 5, (8, 4 + 4 * (n % 2)), np.uint8).tolist() for n in range(12)]
    images = [pictures.encoded_image(8, 4 + 4 * (n % 2), n) for n in range(12)]
    features = Features({"image": Image(), "mask": List(List(Value("uint8")))})
    columns = {"image": [{"bytes": one, "path": None} for one in images], "mask": masks}
    dataset = Dataset.from_dict(columns, features=features)
    table = dataset.data.table.cast(features.arrow_schema)
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=4)
    options = {"patch_size": 4, "mask_column": "mask", "target_stride": 1}
    packs = WindowPacks(
        ImageFiles(tmp_path / "all.parquet"), 8, cache_dir=tmp_path, window_rows=8, **options
    )
    assert packs.has_targets
    loader = loader_of(packs, 1)
    known = {}
    for batch in loader:
        for row in range(len(batch["segment_ids"])):
            for number, example in enumerate(batch["example_index"][row]):
                own = batch["segment_ids"][row] == number + 1
                if example >= 0:
                    known[int(example)] = batch["targets"][row, own]
    assert sorted(known) == list(range(12))
    for example, found in known.items():
        mask = np.array(masks[example])
        wanted = mask.reshape(2, 4, -1, 4).transpose(0, 2, 1, 3).reshape(len(found), 16)
        assert found.tolist() == wanted.tolist()


def test_more_images_that_cannot_be_decoded_than_allowed_stop_the_loop(folder, cache):
    packs = packs_of(folder, cache, max_bad_fraction=0.05)
    assert packs.rejects == []
    with pytest.raises(TooManyRejects, match=r"4 of 60 examples \(6.67%\), expected at most 5.00%"):
        list(loader_of(packs, 1))
    with pytest.raises(TooManyRejects, match="is bad"):
        list(loader_of(packs_of(folder, cache, on_error="raise"), 1))


def darker(pixels, rng):
    return pixels // 2 + rng.integers(0, 2, pixels.shape, np.uint8)


def test_a_transform_draws_by_seed_epoch_and_example(many, cache):
    options = {"patch_size": 4, "window_rows": 16, "cache_dir": cache}
    plain = WindowPacks(many, 6, **options)
    packs = WindowPacks(many, 6, transform=darker, **options)
    assert packs.transform_name.endswith("darker")
    one, again = (next(iter(loader_of(packs, 4))) for _ in range(2))
    assert one["patches"].tobytes() == again["patches"].tobytes()
    assert (one["patches"].max(), next(iter(loader_of(plain, 4)))["patches"].max()) == (128, 255)
    with pytest.raises(ValueError, match="transform"):
        loader_of(plain, 4).load_state_dict(loader_of(packs, 4).state_dict())


@pytest.mark.parametrize("other", [{"lanes": 4}, {"window_rows": 30}, {"drop_rate": 0.1}])
def test_a_state_of_other_packs_is_refused(folder, cache, other):
    state = loader_of(packs_of(folder, cache, lanes=2), 4).state_dict()
    with pytest.raises(ValueError, match=r"state\['fingerprint'\] is .*: use the data, options"):
        loader_of(packs_of(folder, cache, **{"lanes": 2, **other}), 4).load_state_dict(state)


def rewritten(folder, where, change):
    """Files as in a folder, each image changed by a function of its row."""
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        images = [{**one, "bytes": change(n)} for n, one in enumerate(table["image"].to_pylist())]
        column = pa.array(images, table.schema.field("image").type)
        table = table.set_column(table.schema.get_field_index("image"), "image", column)
        pq.write_table(table.cast(pq.read_schema(path)), where / path.name, row_group_size=5)


def test_a_state_is_refused_with_other_images_of_the_same_sizes(folder, cache, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for where, seed in ((one, 1), (other, 2)):
        where.mkdir()
        rewritten(folder, where, lambda n, seed=seed: pictures.encoded_image(4, 8, n * seed))
    state = loader_of(packs_of(one, cache), 4).state_dict()
    packs = packs_of(other, cache)
    assert packs.fingerprint(Key(0, 0)) == state["fingerprint"]
    with pytest.raises(
        ValueError, match=r"state\['contents'\]\['files'\] is .* the files hold oth"
    ):
        loader_of(packs, 4).load_state_dict(state)


def test_a_state_is_refused_with_labels_that_changed_places(cache, tmp_path):
    images = [{"bytes": pictures.encoded_image(4, 8, n), "path": None} for n in range(6)]
    features = Features({"image": Image(), "label": Value("int64")})

    def packs(labels):
        dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
        table = dataset.data.table.cast(features.arrow_schema)
        path = tmp_path / "one.parquet"
        # Such files end alike, whatever the order of the labels.
        pq.write_table(table, path, compression="none", use_dictionary=False)
        os.utime(path, (10**9, 10**9 + labels[1]))
        return WindowPacks(ImageFiles(path), 6, patch_size=4, cache_dir=cache)

    known = packs([0, 1, 2, 3, 4, 5])
    state = loader_of(known, 1).state_dict()
    other = packs([0, 2, 1, 3, 4, 5])
    assert other.fingerprint(Key(0, 0)) == known.fingerprint(Key(0, 0))
    with pytest.raises(ValueError, match=r"state\['contents'\]\['values'\] is .* the labels or"):
        loader_of(other, 1).load_state_dict(state)
    loader_of(packs([0, 1, 2, 3, 4, 5]), 1).load_state_dict(state)


def test_files_that_change_while_they_are_read_are_an_error_and_their_sizes_forgotten(
    folder, tmp_path
):
    files = tmp_path / "files"
    files.mkdir()
    rewritten(folder, files, lambda n: pictures.encoded_image(4, 8, n))
    packs = packs_of(files, tmp_path / "cache")
    rewritten(folder, files, lambda n: pictures.encoded_image(8, 4, n))
    with pytest.raises(ValueError, match=r"is \(8, 4\), expected \(4, 8\)"):
        list(loader_of(packs, 1))
    assert list((tmp_path / "cache").glob("packpipe-sizes-*.npy")) == []


def test_what_cannot_be_done_by_windows_is_refused_by_name(folder, cache, tmp_path):
    packs = packs_of(folder, cache, lanes=3)
    with pytest.raises(ValueError, match=re.escape("lanes is 3, expected a divisor of 8 (batch_")):
        loader_of(packs, 4, rank=0, world_size=2)
    with pytest.raises(ValueError, match=re.escape("lanes is 3, expected a divisor of 4 (batch_")):
        len(loader_of(packs, 4))
    with pytest.raises(ValueError, match="balance is True, expected False with windows; packs of"):
        loader_of(packs, 3, balance=True)
    with pytest.raises(ValueError, match="lanes is 0, expected an integer in 1"):
        packs_of(folder, cache, lanes=0)
    with pytest.raises(ValueError, match="window_rows is 0, expected an integer in 1"):
        packs_of(folder, cache, window_rows=0)
    over = packpipe.OverTraining(0.5, 0.1, 0.5, -0.1)
    with pytest.raises(ValueError, match=r"drop_rate is OverTraining.*expected one that does not"):
        packs_of(folder, cache, drop_rate=over, epochs=3)
    with pytest.raises(
        TypeError, match=re.escape("type(files) is 'str', expected ImageFiles; pass")
    ):
        WindowPacks("train/*.parquet")
    with pytest.raises(TypeError, match=r"type.dataset. is 'ImageFiles', expected Dataset; .*W"):
        EpochPacks(ImageFiles(folder))
    with pytest.raises(ValueError, match="cache_dir is 's3://bucket/kept', expected"):
        packs_of(folder, "s3://bucket/kept")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir is '.*file', expected a folder; pass "):
        packs_of(folder, tmp_path / "file")
    with pytest.raises(ValueError, match="label_column is 'colour', expected one of"):
        packs_of(folder, cache, label_column="colour")


def test_a_loader_warns_once_if_ranks_read_the_same_windows(folder, cache, caplog):
    packs = packs_of(folder, cache, lanes=2)
    for rank, ranks in ((0, 2), (1, 4), (0, 1)):
        next(iter(loader_of(packs, 2, rank=rank, world_size=ranks)))
    assert "ranks" not in caplog.text
    loader = loader_of(packs, 1, rank=0, world_size=4)
    for _ in range(2):
        next(iter(loader))
    (said,) = [one for one in caplog.messages if "ranks" in one]
    assert said == (
        "lanes is 2 with 4 ranks: 4 does not divide 2, so that windows are read by several ranks "
        "each; pass lanes=4, or a multiple"
    )


def test_labels_that_are_lists_are_refused(tmp_path):
    image = {"bytes": pictures.encoded_image(4, 4), "path": None}
    features = Features({"image": Image(), "label": List(Value("float32"))})
    dataset = Dataset.from_dict({"image": [image], "label": [[1.0, 2.0]]}, features=features)
    pq.write_table(dataset.data.table.cast(features.arrow_schema), tmp_path / "one.parquet")
    with pytest.raises(ValueError, match=re.escape("features['label'] is List(")):
        WindowPacks(ImageFiles(tmp_path / "one.parquet"), 6, cache_dir=tmp_path)


def test_the_tail_of_few_packs_leaves_ranks_without_any(folder, cache):
    packs = packs_of(folder, cache, lanes=2)
    num_packs = packs.num_packs(Key(0, 0))
    size = 2 * math.ceil(num_packs / 2 + 8)
    ranks = [
        loader_of(packs, 1, rank=rank, world_size=size, tail="pad") for rank in (0, 1, size - 1)
    ]
    found = [list(loader) for loader in ranks]
    assert [len(batches) for batches in found] == [1, 1, 1]
    held = [int((batches[0]["segment_ids"] > 0).any()) for batches in found]
    assert held[0] == 1
    assert 0 in held
    assert {batches[0]["patches"].shape for batches in found} == {(1, 6, 48)}
