from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import fields, replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from packpipe.packing.packs import pack_lengths
from packpipe.planning.crops import CenterCrop
from packpipe.planning.distributions import Beta, Uniform
from packpipe.planning.dropping import ByResolution, OverTraining
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import EpochPlan, plan_epoch
from packpipe.planning.resolution import Area, Budget, Side, Square

SMALL = PackConfig(seq_len=24)
MANY = np.random.default_rng(7).integers(1, 120, (300, 2))


def packs_of(plan: EpochPlan) -> list[list[int]]:
    return [pack.tolist() for pack in plan]


@given(strategies.size_lists(), strategies.configs(), strategies.keys())
@example([(16, 16)] * 30, PackConfig(seq_len=8, window=7, max_segments=3), (0, 0))
def test_every_image_lands_in_exactly_one_pack_within_the_limits(sizes, config, key):
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    packs = packs_of(plan)
    assert sorted(image for pack in packs for image in pack) == list(range(len(sizes)))
    assert all(1 <= len(pack) <= config.max_segments for pack in packs)
    assert all(plan.seq_lens[pack].sum() <= config.seq_len for pack in packs)
    tokens = plan.grid_hw.astype(int).prod(axis=1)
    assert plan.num_keep.min() >= 1
    assert tokens.max() <= config.token_limit
    assert (plan.num_keep <= tokens).all()
    if not config.drops:
        assert (plan.num_keep == tokens).all()


def balanced(lengths, seq_len, max_segments):
    """The packer itself, which has its own twin in test_packing.py."""
    packs = pack_lengths(lengths, seq_len, strategy="balanced", max_segments=max_segments)
    return [pack.tolist() for pack in packs]


RULES = {
    "ffd": naive.first_fit_decreasing,
    "next_fit": naive.next_fit,
    "best_fit": naive.best_fit,
    "balanced": balanced,
}


@given(strategies.size_lists(), strategies.configs(), strategies.keys(), st.data())
@example([(16, 16)] * 30, PackConfig(seq_len=8, window=7, max_segments=3), (1, 2), None)
@example(
    MANY.tolist()[:40],
    PackConfig(
        seq_len=40,
        resolution=Side(Uniform(16, 150)),
        drop_rate=OverTraining(Beta(0.1, 0.7), ByResolution(1, 0.5, 90, 0.8), 0.5, 0.2),
        epochs=2,
        fit_last="drop_rate",
        window=13,
        strategy="ffd",
    ),
    (1, 1),
    None,
)
@example(
    MANY.tolist()[:40],
    PackConfig(
        seq_len=40,
        resolution=Area([500, 9000]),
        drop_rate=0.3,
        fit_last="resolution",
        fit_limit=1,
        window=9,
    ),
    (1, 1),
    None,
)
def test_a_plan_is_the_naive_one(sizes, config, key, data):
    rows = st.lists(st.integers(0, 2**62), min_size=len(sizes), max_size=len(sizes), unique=True)
    index = list(range(len(sizes))) if data is None else data.draw(rows)
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1], index=index)
    decided = [
        naive.decide(height, width, config, *key, i)
        for (height, width), i in zip(sizes, index, strict=True)
    ]
    grids, keeps, shrunk = zip(*decided, strict=True)
    packs = naive.plan(
        [keep + config.prefix_tokens for keep in keeps],
        index,
        config.seq_len,
        rule=RULES[config.strategy],
        max_segments=config.max_segments,
        window=config.window,
        seed=key[0],
        epoch=key[1],
    )
    fitted = 0
    if config.fit_last is not None:
        shown = [
            naive.shown_hw(size, config, *key, i) for size, i in zip(sizes, index, strict=True)
        ]
        packs, grids, keeps, fitted = naive.fit_last(packs, shown, grids, keeps, config)
    assert plan.grid_hw.tolist() == [list(grid) for grid in grids]
    assert plan.num_keep.tolist() == list(keeps)
    assert packs_of(plan) == [[index[i] for i in pack] for pack in packs]
    assert plan.num_shrunk == sum(shrunk)
    assert plan.num_fitted == fitted


def test_packs_hold_several_images_where_they_fit():
    plan = plan_epoch(MANY, PackConfig(seq_len=64, max_segments=4))
    held = [len(pack) for pack in plan]
    assert max(held) == 4
    assert sum(held) == 300
    assert sorted(image for pack in packs_of(plan) for image in pack) == list(range(300))


@given(strategies.size_lists(min_size=2), strategies.configs(), strategies.keys(), st.data())
def test_any_images_grid_and_tokens_can_be_recomputed_alone(sizes, config, key, data):
    config = replace(config, fit_last=None)
    chosen = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    whole = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    part = plan_epoch([sizes[i] for i in chosen], config, seed=key[0], epoch=key[1], index=chosen)
    assert part.grid_hw.tolist() == whole.grid_hw[chosen].tolist()
    assert part.num_keep.tolist() == whole.num_keep[chosen].tolist()
    assert part.image_hw.tolist() == whole.image_hw[chosen].tolist()


# One pack, filled as images come: its segments stand in plan order.
IN_ORDER = PackConfig(seq_len=2000, strategy="next_fit", max_tokens=1, max_segments=2000)


@given(strategies.size_lists(min_size=2), strategies.keys(), st.data())
def test_the_plan_order_of_a_subset_is_the_whole_one_with_the_others_left_out(sizes, key, data):
    chosen = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))

    def ordered(index):
        some = [sizes[i] for i in index]
        (pack,) = plan_epoch(some, IN_ORDER, seed=key[0], epoch=key[1], index=index)
        return pack.tolist()

    whole = ordered(range(len(sizes)))
    assert whole == naive.seeded_order(*key, range(len(sizes)), 0)
    assert ordered(chosen) == [image for image in whole if image in set(chosen)]


@given(strategies.size_lists(min_size=2), strategies.configs(), strategies.keys())
@example([(16, 48), (32, 16), (16, 16)] * 5, PackConfig(seq_len=8), (0, 0))
def test_packs_depend_on_token_counts_only(sizes, config, key):
    config = replace(config, crop=None)  # the boxes of turned images are not those boxes turned
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    turned = plan_epoch(
        [(width, height) for height, width in sizes], config, seed=key[0], epoch=key[1]
    )
    assert turned.num_keep.tolist() == plan.num_keep.tolist()
    assert turned.grid_hw.tolist() == plan.grid_hw[:, ::-1].tolist()
    assert packs_of(turned) == packs_of(plan)


def test_turned_images_share_packs_as_the_upright_ones_did():
    config = PackConfig(seq_len=64)
    packs = packs_of(plan_epoch(MANY, config))
    assert max(map(len, packs)) > 1
    assert packs_of(plan_epoch(MANY[:, ::-1], config)) == packs


@given(
    strategies.size_lists(min_size=2),
    strategies.configs(),
    strategies.keys(),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_input_does_not_matter_when_the_index_travels_along(
    sizes, config, key, random
):
    order = list(range(len(sizes)))
    random.shuffle(order)
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    moved = plan_epoch([sizes[i] for i in order], config, seed=key[0], epoch=key[1], index=order)
    assert packs_of(moved) == packs_of(plan)


def windows_of(num_images, window, key):
    """The window of each image: that of its place in the order, all of them almost equal."""
    order = naive.seeded_order(*key, range(num_images), 0)
    num_windows = -(-num_images // window)
    starts = [num_images * w // num_windows for w in range(num_windows + 1)]
    return {image: w for w in range(num_windows) for image in order[starts[w] : starts[w + 1]]}


@given(strategies.size_lists(min_size=2), strategies.configs(max_window=8), strategies.keys())
def test_no_pack_mixes_windows_and_windows_stay_in_order(sizes, config, key):
    assume(config.window < len(sizes))
    window_of = windows_of(len(sizes), config.window, key)
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    windows = [{window_of[image] for image in pack} for pack in packs_of(plan)]
    assert all(len(found) == 1 for found in windows)
    in_order = [window for (window,) in windows]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) == -(-len(sizes) // config.window) > 1


@pytest.mark.parametrize(
    ("num_images", "window", "held"),
    [
        (10, 4, [3, 3, 4]),  # not 4, 4 and a remainder of 2
        (9, 4, [3, 3, 3]),
        (8, 4, [4, 4]),
        (5, 4, [2, 3]),
        (4, 4, [4]),
        (3, 1, [1, 1, 1]),
        (300, 65536, [300]),
    ],
)
def test_windows_are_of_almost_equal_size(num_images, window, held):
    config = PackConfig(seq_len=1024, window=window, max_segments=1024, max_tokens=1)
    plan = plan_epoch(MANY[:num_images], config)
    assert [len(pack) for pack in plan] == held  # a window is a pack


def test_packs_of_several_images_do_not_mix_windows_and_are_shuffled_inside_theirs():
    config = PackConfig(seq_len=64, window=50, strategy="next_fit")
    window_of = windows_of(300, 50, (3, 4))
    packs = packs_of(plan_epoch(MANY, config, seed=3, epoch=4))
    assert max(map(len, packs)) > 1
    assert all(len({window_of[image] for image in pack}) == 1 for pack in packs)
    assert [window_of[pack[0]] for pack in packs] == sorted(window_of[pack[0]] for pack in packs)
    # Next fit makes packs in plan order; the plan's are in another, in every window.
    order = naive.seeded_order(3, 4, range(300), 0)
    for window in range(6):
        places = [order.index(pack[0]) for pack in packs if window_of[pack[0]] == window]
        assert len(places) > 3
        assert places != sorted(places)


def test_the_windows_of_a_plan_turn_their_packs_differently():
    # One image a pack, so that the order within a window is that of its packs' numbers.
    config = PackConfig(seq_len=1, window=10, max_tokens=1, strategy="next_fit")
    order = naive.seeded_order(3, 4, range(30), 0)
    packs = [pack[0] for pack in packs_of(plan_epoch(MANY[:30], config, seed=3, epoch=4))]
    turns = [
        tuple(order.index(image) - 10 * w for image in packs[10 * w : 10 * w + 10])
        for w in range(3)
    ]
    assert len(set(turns)) == 3
    assert all(sorted(turn) == list(range(10)) for turn in turns)


def test_every_epoch_and_every_seed_have_an_order_of_their_own():
    orders = [
        packs_of(plan_epoch(MANY, PackConfig(seq_len=64), seed=seed, epoch=epoch))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]
    ]
    assert len({str(order) for order in orders}) == 5


def test_the_same_arguments_give_the_same_plan():
    first, again = (plan_epoch(MANY, PackConfig(seq_len=64), seed=5, epoch=6) for _ in range(2))
    assert packs_of(first) == packs_of(again)
    assert len(first) > 1


@pytest.fixture
def plan() -> EpochPlan:
    return plan_epoch([[64, 64], [32, 96], [48, 16], [400, 400]], SMALL, index=[7, 3, 9, 11])


def test_a_plan_is_a_sequence_of_source_rows(plan):
    assert len(plan) == 3
    assert sorted(image for pack in packs_of(plan) for image in pack) == [3, 7, 9, 11]
    assert plan[-1].tolist() == plan[2].tolist()
    members = [plan.packs[pack].tolist() for pack in range(3)]
    assert [[[7, 3, 9, 11][i] for i in pack] for pack in members] == packs_of(plan)
    with pytest.raises(IndexError):
        plan[3]
    with pytest.raises(IndexError):
        plan[-4]


def test_a_plan_knows_its_figures(plan):
    assert plan.grid_hw.tolist() == [[4, 4], [2, 6], [3, 1], [4, 4]]
    assert plan.num_keep.tolist() == [16, 12, 3, 16]
    assert plan.quality.num_tokens == 47
    assert plan.quality.fill == 47 / 72
    assert plan.quality.padding == 1 - 47 / 72
    assert plan.quality.bound == 3  # 16, 16 and 12: no two go together
    assert plan.quality.gap == 0
    assert plan.num_shrunk == 1
    assert repr(plan) == (
        "EpochPlan(4 images, 47 tokens in 3 packs of 24: padding 34.72%, gap 0; seed 0, epoch 0)"
    )


def test_the_arrays_have_the_widths_they_are_stored_in(plan):
    arrays = (plan.index, plan.image_hw, plan.grid_hw, plan.num_keep, plan.order, plan.offsets)
    found = [str(array.dtype) for array in arrays]
    assert found == ["int64", "int32", "int16", "int32", "int64", "int64"]


@given(strategies.size_lists(), strategies.configs(), strategies.keys())
def test_attention_work_is_the_sum_of_squared_lengths(sizes, config, key):
    plan = plan_epoch(sizes, config, seed=key[0], epoch=key[1])
    wanted = [
        sum(int(plan.seq_lens[i]) ** 2 for i in plan.packs[pack]) for pack in range(len(plan))
    ]
    assert plan.packs.attention_work.tolist() == wanted
    assert plan.packs.attention_work.dtype == np.int64


def test_attention_work_does_not_overflow():
    # Above 2**31 together.
    config = PackConfig(seq_len=32767, patch_size=1, max_segments=3)
    plan = plan_epoch([[150, 200]] * 3 + [[100, 320], [10, 70]], config)
    assert sorted(plan.packs.attention_work.tolist()) == [900_000_000] * 3 + [32_000**2 + 700**2]


@given(strategies.size_lists(), strategies.configs())
def test_no_plan_is_below_its_bound(sizes, config):
    plan = plan_epoch(sizes, config)
    assert plan.quality.gap == len(plan) - plan.quality.bound
    assert plan.quality.gap >= 0
    assert plan.quality.bound * config.seq_len >= plan.quality.num_tokens
    assert plan.quality.bound * config.max_segments >= len(sizes)


@pytest.mark.parametrize("empty", [[], np.empty((0, 2), np.int64), np.empty(0)])
def test_no_images_give_no_packs(empty):
    plan = plan_epoch(empty, SMALL)
    assert len(plan) == 0
    assert packs_of(plan) == []
    assert plan.quality.fill == 1.0
    assert plan.quality.num_tokens == plan.quality.bound == plan.quality.gap == plan.num_shrunk == 0
    assert repr(plan) == (
        "EpochPlan(0 images, 0 tokens in 0 packs of 24: padding 0.00%, gap 0; seed 0, epoch 0)"
    )


def test_an_extreme_image_is_kept():
    plan = plan_epoch([[1, 2**31 - 1], [2**31 - 1, 1]], replace(SMALL, max_segments=1))
    assert plan.grid_hw.tolist() == [[1, 24], [24, 1]]
    assert plan.num_shrunk == 2


CASES = st.tuples(strategies.size_lists(), strategies.configs(), strategies.keys())


def of(case) -> EpochPlan:
    sizes, config, key = case
    return plan_epoch(sizes, config, seed=key[0], epoch=key[1])


DROPPED = (
    MANY.tolist()[:60],
    PackConfig(
        seq_len=50,
        resolution=Side(Uniform(16, 150)),
        drop_rate=OverTraining(0.1, ByResolution(1, 0.5, 90, 0.8), 0.5, 0.2),
        epochs=4,
        fit_last="drop_rate",
        window=25,
    ),
    (3, 2),
)
BUDGETED = (
    MANY.tolist()[:60],
    PackConfig(seq_len=50, resolution=Budget([9, 25, 60]), fit_last="resolution", max_upscale=3),
    (0, 1),
)


def assert_equal(one: EpochPlan, other: EpochPlan) -> None:
    for field in fields(EpochPlan):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype
            assert first.shape == second.shape
            assert first.tolist() == second.tolist()
        else:
            assert type(first) is type(second)
            assert first == second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@settings(max_examples=20)  # each waits for the disk
@given(CASES)
@example(DROPPED)
@example(BUDGETED)
@example(([], PackConfig(), (2**64 - 1, 2**63)))
def test_a_saved_plan_is_loaded_as_it_was(folder, case):
    plan = of(case)
    path = folder / "plan.npz"
    plan.save(path)
    assert [file.name for file in folder.iterdir()] == ["plan.npz"], "nothing half-written is left"
    loaded = EpochPlan.load(path)
    assert_equal(loaded, plan)
    assert loaded.fingerprint == plan.fingerprint
    assert repr(loaded) == repr(plan)


def test_a_plan_is_saved_under_the_very_name_given(tmp_path):
    of(DROPPED).save(str(tmp_path / "plan"))
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]
    assert EpochPlan.load(str(tmp_path / "plan")).fingerprint == of(DROPPED).fingerprint


def test_what_a_killed_process_left_beside_a_plan_is_removed(tmp_path):
    (tmp_path / f"plan.npz.{'0f' * 16}.partial").write_bytes(b"half")
    of(DROPPED).save(tmp_path / "plan.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.npz"]


def test_a_plan_that_cannot_be_saved_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.npz"
    of(DROPPED).save(path)
    before = path.read_bytes()

    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        of(BUDGETED).save(path)
    assert path.read_bytes() == before


REMEDY = "pass a file that EpochPlan.save wrote, or plan again"


def refused(path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at by the caller)
        EpochPlan.load(path)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.npz"
    of(DROPPED).save(path)
    return path


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    message = refused(saved)
    assert re.search(r"plan\.npz is .*unreadable \(.+\).*, expected a saved plan; ", message)
    assert message.endswith(REMEDY)


def flipped(data: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= mask
    return bytes(changed)


@pytest.fixture(scope="module")
def plan_and_bytes(folder):
    plan, path = of(DROPPED), folder / "whole.npz"
    plan.save(path)
    data = path.read_bytes()
    path.unlink()
    return plan, data


@given(share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_file_of_which_a_byte_has_changed_is_refused_or_says_the_same(
    folder, plan_and_bytes, share, mask
):
    plan, data = plan_and_bytes
    path = folder / "changed.npz"
    path.write_bytes(flipped(data, int(share * len(data)), mask))
    try:
        loaded = EpochPlan.load(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        assert str(error).endswith(REMEDY)  # noqa: PT017
    else:
        assert_equal(loaded, plan)  # a date in the archive's own tables, for one
    path.unlink()


def test_a_changed_byte_in_the_archives_own_tables_is_refused_too(saved):
    # Of the version needed to read it, of its flags, and of where its tables lie.
    data = saved.read_bytes()
    tables, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    for place, mask in [(tables + 6, 0x80), (tables + 8, 1), (tables + 10, 8), (end + 16, 0xFF)]:
        saved.write_bytes(flipped(data, place, mask))
        message = refused(saved)
        assert "unreadable (" in message
        assert message.endswith(REMEDY)


def contents(path):
    """(header, arrays) of a saved plan."""
    with np.load(path) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("header"))), arrays


def write(path, header, arrays):
    with path.open("wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)


def swapped(arrays):
    arrays["order"] = arrays["order"][::-1].copy()


def grown(arrays):
    arrays["num_keep"][3] += 1


@pytest.mark.parametrize("change", [swapped, grown])
def test_arrays_that_were_altered_are_refused(saved, change):
    header, arrays = contents(saved)
    change(arrays)
    write(saved, header, arrays)
    message = refused(saved)
    pattern = r"plan\.npz fingerprint is '[0-9a-f]{32}', expected " + header["fingerprint"]
    assert re.search(pattern + f"; {REMEDY}$", message)


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"epoch": 1}, {"num_shrunk": 99}, {"num_fitted": 99}],
    ids=lambda change: next(iter(change)),
)
def test_a_header_that_was_altered_is_refused(saved, change):
    header, arrays = contents(saved)
    write(saved, {**header, **change}, arrays)
    assert "plan.npz fingerprint is '" in refused(saved)


def test_an_option_that_was_altered_is_refused(saved):
    header, arrays = contents(saved)
    header["config"]["window"] += 1
    write(saved, header, arrays)
    assert "plan.npz fingerprint is '" in refused(saved)


@pytest.mark.parametrize("missing", ["num_keep", "header"])
def test_a_file_without_one_of_its_parts_is_refused(saved, missing):
    with np.load(saved) as file:
        arrays = dict(file)
    del arrays[missing]
    with saved.open("wb") as file:
        np.savez(file, **arrays)
    message = refused(saved)
    assert "unreadable (" in message
    assert missing in message
    assert message.endswith(f", expected a saved plan; {REMEDY}")


@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_of_another_version_is_refused(saved, renamed):
    header, arrays = contents(saved)
    if renamed:  # its arrays may have other names
        arrays["tokens"] = arrays.pop("num_keep")
    write(saved, {**header, "version": 2}, arrays)
    assert refused(saved) == f"{saved} version is 2, expected 1; {REMEDY}"


@pytest.mark.parametrize("what", [b"", b"{}", b"PK", b"\x93NUMPY"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, what):
    path = tmp_path / "plan.npz"
    path.write_bytes(what)
    assert refused(path).endswith(f", expected a saved plan; {REMEDY}")


def test_an_array_is_no_plan(tmp_path):
    np.save(tmp_path / "plan.npy", np.arange(3))
    assert refused(tmp_path / "plan.npy").endswith(f", expected a saved plan; {REMEDY}")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.npz"):
        EpochPlan.load(tmp_path / "no.npz")


@given(CASES)
@example(DROPPED)
def test_equal_plans_have_equal_fingerprints(case):
    assert of(case).fingerprint == of(case).fingerprint
    assert re.fullmatch("[0-9a-f]{32}", of(case).fingerprint)


OPTIONS = {
    "seq_len": 51,
    "patch_size": 8,
    "crop": CenterCrop(),
    "resolution": Side(Uniform(16, 151)),
    "max_tokens": 40,
    "max_upscale": 9,
    "drop_rate": 0.1,
    "epochs": 5,
    "fit_last": None,
    "fit_limit": 0.3,
    "max_segments": 63,
    "strategy": "ffd",
    "window": 26,
    "background": (255, 255, 254),
    "reducing_gap": None,
    "downscale_filter": "lanczos",
    "upscale_filter": "bilinear",
    "max_pixels": 10**6,
    "profiles": "ignore",
    "damaged_scans": "strict",
    "value_range": (0, 1),
    "views": 2,
    "jpeg_edges": "padded",
    "prefix_tokens": 2,
    "pixels": "turbo",
}
TWO = {"views": 2, "max_tokens": 9}


def test_any_change_gives_another_fingerprint():
    sizes, config, (seed, epoch) = DROPPED
    named = [*OPTIONS, "views_together"]
    assert sorted(named) == sorted(field.name for field in fields(PackConfig))
    options = [{name: OPTIONS[name]} for name in OPTIONS] + [TWO, {**TWO, "views_together": True}]
    changed = [(sizes, replace(config, **some), (seed, epoch)) for some in options]
    changed += [
        (sizes, config, (seed + 1, epoch)),
        (sizes, config, (seed, epoch + 1)),
        ([(sizes[0][0] + 1, sizes[0][1]), *sizes[1:]], config, (seed, epoch)),
        (sizes[:-1], config, (seed, epoch)),
        ([*sizes[:-2], sizes[-1], sizes[-2]], config, (seed, epoch)),
    ]
    found = {of(case).fingerprint for case in [DROPPED, *changed]}
    assert len(found) == 1 + len(changed) == 33
    moved = plan_epoch(sizes, config, seed=seed, epoch=epoch, index=range(1, 61))
    assert moved.fingerprint not in found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"drop_rate": 0}, {"drop_rate": 0.0}),
        ({"max_upscale": 2}, {"max_upscale": 2.0}),
        ({"fit_limit": 1}, {"fit_limit": 1.0}),
        ({"resolution": Side(224)}, {"resolution": Side(224.0)}),
        ({"resolution": Area(Uniform(64, 256))}, {"resolution": Area(Uniform(64.0, 256.0))}),
        ({"drop_rate": 0.25}, {"drop_rate": np.float32(0.25)}),
        ({"drop_rate": [0.25, 0.5]}, {"drop_rate": (0.25, 0.5)}),
    ],
    ids=str,
)
def test_equal_options_give_equal_fingerprints(one, other):
    first, second = PackConfig(seq_len=50, **one), PackConfig(seq_len=50, **other)
    assert first == second
    plans = [plan_epoch(MANY[:20], config) for config in (first, second)]
    assert plans[0].fingerprint == plans[1].fingerprint


@given(CASES)
@example(DROPPED)
@example(BUDGETED)
def test_every_example_is_found_and_explained(case):
    sizes, config, key = case
    plan = of(case)
    fitted = shrunk = 0
    for i, (height, width) in enumerate(sizes):
        pack = plan.pack_of(i)
        assert i in plan[pack].tolist()
        why = plan.explain(i)
        assert (why.example, why.pack, why.config) == (i, pack, config)
        assert plan[pack][why.segment] == i
        assert why.image_hw == (height, width)
        assert why.grid_hw == tuple(plan.grid_hw[i].tolist())
        assert why.num_keep == plan.num_keep[i]
        decided = naive.decide(height, width, config, *key, i)
        assert (why.decided_grid_hw, why.decided_num_keep, why.shrunk) == decided
        assert why.fitted == (decided[:2] != (why.grid_hw, why.num_keep))
        assert (why.drop_rate is None) == (not config.drops)
        assert (why.drawn is None) == isinstance(config.resolution, str)
        assert ("fitted" in str(why)) == why.fitted
        assert ("shrunk to fit" in str(why)) == why.shrunk
        fitted, shrunk = fitted + why.fitted, shrunk + why.shrunk
    assert (fitted, shrunk) == (plan.num_fitted, plan.num_shrunk)


def test_some_examples_are_fitted_and_some_shrunk():
    for case in (DROPPED, BUDGETED):
        plan = of(case)
        assert 0 < plan.num_fitted < len(plan.index)
    config = PackConfig(seq_len=20, drop_rate=0.1)
    assert 0 < plan_epoch(MANY, config).num_shrunk < 300


def test_examples_are_found_by_their_row_whatever_the_order_they_came_in(plan):
    for row, position in {7: 0, 3: 1, 9: 2, 11: 3}.items():
        why = plan.explain(row)
        assert row in plan[plan.pack_of(row)].tolist()
        assert why.example == row
        assert why.image_hw == tuple(plan.image_hw[position].tolist())
        assert plan[why.pack][why.segment] == row
    assert plan.explain(np.int64(7)).example == 7


@pytest.mark.parametrize("example", [0, 4, 8, 12, -1, 2**62])
@pytest.mark.parametrize("ask", [EpochPlan.pack_of, EpochPlan.explain])
def test_an_unknown_example_is_named(plan, ask, example):
    message = (
        f"example is {example}, expected an example of the plan; see plan.index, and the rejects"
    )
    with pytest.raises(KeyError) as caught:
        ask(plan, example)
    assert caught.value.args == (message,)


def test_a_plan_without_images_knows_no_example():
    with pytest.raises(KeyError, match="example is 0, expected an example of the plan"):
        plan_epoch([], SMALL).pack_of(0)


def test_an_example_is_a_whole_number(plan):
    with pytest.raises(TypeError, match="integer"):
        plan.pack_of(7.0)


def test_a_plain_explanation(plan):
    assert str(plan.explain(3)) == (
        f"example 3: pack {plan.pack_of(3)}, segment 0\n"
        "  size    32 x 96 pixels\n"
        "  grid    2 x 6 patches of 16 (native)"
    )
    assert str(plan.explain(11)) == (
        f"example 11: pack {plan.pack_of(11)}, segment 0\n"
        "  size    400 x 400 pixels\n"
        "  grid    4 x 4 patches of 16 (native), shrunk to fit"
    )


def test_a_full_explanation():
    # 640 x 480 pixels as 160² are 11.5 x 8.7 patches: 12 x 9, half of which is kept, and then more.
    config = PackConfig(seq_len=60, resolution=Side([160]), drop_rate=0.5, fit_last="drop_rate")
    plan = plan_epoch([[640, 480]], config)
    assert str(plan.explain(0)) == (
        "example 0: pack 0, segment 0\n"
        "  size    640 x 480 pixels\n"
        "  grid    12 x 9 patches of 16 (Side(pixels=Choice(values=(160,), weights=None), "
        "rounding='nearest') drew 160)\n"
        "  keeps   54 of 108 tokens (rate 0.5000 by 0.5)\n"
        "  fitted  12 x 9 patches, keeps 60 of 108 tokens (fit_last='drop_rate')"
    )


def test_a_plain_vits_rows_are_one_square_each_without_padding():
    config = PackConfig(seq_len=196, max_segments=1, resolution=Square(224))
    plan = plan_epoch(MANY, config)
    assert len(plan) == len(MANY)
    assert plan.quality.fill == 1
    assert np.unique(plan.grid_hw).tolist() == [14]
    assert plan.num_shrunk == plan.quality.gap == 0
    height, width = MANY[5].tolist()
    assert str(plan.explain(5)) == (
        f"example 5: pack {plan.pack_of(5)}, segment 0\n"
        f"  size    {height} x {width} pixels\n"
        "  grid    14 x 14 patches of 16 (Square(pixels=Constant(value=224), rounding='nearest') "
        "drew 224)"
    )


def test_an_enlarged_image_is_explained():
    config = PackConfig(seq_len=24, fit_last="resolution", fit_limit=0.5)
    plan = plan_epoch([[8, 256]], config)
    assert str(plan.explain(0)) == (
        "example 0: pack 0, segment 0\n"
        "  size    8 x 256 pixels\n"
        "  grid    1 x 16 patches of 16 (native)\n"
        "  fitted  1 x 24 patches, keeps 24 of 24 tokens (fit_last='resolution')"
    )


def test_a_plan_of_the_training_ends_with_it():
    config = PackConfig(drop_rate=OverTraining(0.2, 0.8, 0.5, 0.1), epochs=3)
    assert len(plan_epoch([[64, 64]], config, epoch=2)) == 1
    message = "epoch is 3, expected below 3 (epochs); raise epochs"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_epoch([[64, 64]], config, epoch=3)
    half = replace(config, epochs=2.5)
    assert len(plan_epoch([[64, 64]], half, epoch=2)) == 1
    message = "epoch is 3, expected below 2.5 (epochs); raise epochs"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_epoch([[64, 64]], half, epoch=3)


@pytest.mark.parametrize(
    "config",
    [
        PackConfig(),
        PackConfig(
            resolution=Side(Uniform(64, 256)), drop_rate=Beta(0.5, 0.7), fit_last="drop_rate"
        ),
        PackConfig(
            resolution=Side(Uniform(64, 256)),
            drop_rate=Beta(0.5, 0.7),
            fit_last="resolution",
            window=10**6,
        ),
    ],
    ids=["native", "drop_rate", "resolution"],
)
def test_planning_takes_less_than_100_bytes_an_image(config):
    num_images = 200_000
    sizes = np.random.default_rng(0).integers(100, 700, (num_images, 2), np.int32)
    plan_epoch(sizes[:1000], config)  # compiled beforehand
    tracemalloc.start()
    try:
        plan = plan_epoch(sizes, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan.index) == num_images
    assert 30 * num_images < peak < 100 * num_images  # it counts what NumPy takes


SIZES = "leave the image out"
SIDES = f"expected two sides in 1..{2**31 - 1} pixels; {SIZES}"
SHAPE = "pass (height, width) in pixels per image"
KEY = f"expected an integer in 0..{2**64 - 1}; pass a non-negative integer below 2**64"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_hw": [[4, 4], [0, 5]]}, ValueError, f"image_hw[1] is (0, 5), {SIDES}"),
        ({"image_hw": [[4, -4], [0, 5]]}, ValueError, f"image_hw[0] is (4, -4), {SIDES}"),
        ({"image_hw": [[2**31, 5], [1, 1]]}, ValueError, f"image_hw[0] is ({2**31}, 5), {SIDES}"),
        (
            {"image_hw": np.array([[2**63, 5], [1, 1]], np.uint64)},
            ValueError,
            f"image_hw[0] is ({2**63}, 5), {SIDES}",
        ),
        (
            {"image_hw": [[4.0, 5.0], [1.0, 1.0]]},
            TypeError,
            f"image_hw.dtype is 'float64', expected an integer dtype; {SHAPE}",
        ),
        ({"image_hw": [4, 5]}, ValueError, f"image_hw.ndim is 1, expected 2; {SHAPE}"),
        (
            {"image_hw": [[4, 5, 3], [4, 5, 3]]},
            ValueError,
            f"image_hw.shape is (2, 3), expected (images, 2); {SHAPE}",
        ),
        (
            {"index": [5, 5]},
            ValueError,
            "index[1] is 5, expected no repeats; pass each image once",
        ),
        ({"index": [5]}, ValueError, "len(index) is 1, expected 2 (images); one row an image"),
        ({"index": [5, -6]}, ValueError, "index[1] is -6, expected 0 or more; count from zero"),
        (
            {"index": [0.0, 1.0]},
            TypeError,
            (
                "index.dtype is 'float64', expected an integer dtype; "
                "pass each image's row in its source"
            ),
        ),
        ({"seed": -1}, ValueError, f"seed is -1, {KEY}"),
        ({"epoch": 2**64}, ValueError, f"epoch is {2**64}, {KEY}"),
        ({"epoch": 0.0}, TypeError, f"epoch is 0.0, {KEY}"),
        (
            {"config": {"seq_len": 24}},
            TypeError,
            "config is 'dict', expected a PackConfig; pass PackConfig(...)",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"image_hw": [[4, 5], [6, 7]], "config": SMALL, **arguments}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        plan_epoch(**arguments)


def test_a_plan_is_not_saved_behind_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"path is 'gs://plan\.npz', expected a path without"):
        of(DROPPED).save("gs://plan.npz")
    assert list(tmp_path.iterdir()) == []
