from __future__ import annotations

from dataclasses import replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from packpipe.philox import Key
from packpipe.planning.decisions import Decisions, decide, decide_all
from packpipe.planning.distributions import Beta, Choice, Uniform
from packpipe.planning.dropping import ByResolution, OverTraining
from packpipe.planning.image_config import PackConfig
from packpipe.planning.plan import plan_epoch
from packpipe.planning.resolution import Area, Budget, PixelRange, Side, Square

MANY = np.random.default_rng(7).integers(1, 400, (300, 2))
PAPERS = PackConfig(
    resolution=Side(Uniform(64, 384)), drop_rate=ByResolution(16, 0.25, 576, 0.75), seq_len=256
)


def decided(sizes, config, key, index=None) -> Decisions:
    index = np.arange(len(sizes)) if index is None else np.array(index)
    return decide(np.array(sizes), config, Key(*key), index=index)


def listed(found: Decisions):
    """(grid, tokens kept, whether shrunk) of each image."""
    columns = found.grid_hw.tolist(), found.num_keep.tolist(), found.shrunk.tolist()
    return [(tuple(grid), keep, shrunk) for grid, keep, shrunk in zip(*columns, strict=True)]


@st.composite
def cases(draw, **options):
    """(sizes, configuration, key), the training short where progress matters."""
    config = draw(strategies.configs(**options))
    seed, epoch = draw(strategies.keys())
    if config.uses_progress and draw(st.booleans()):
        config = replace(config, epochs=draw(st.sampled_from([1, 2.5, 3])))
        epoch = draw(st.integers(0, int(-(-config.epochs // 1)) - 1))
    return draw(strategies.size_lists(max_size=12)), config, (seed, epoch)


@given(cases())
@example(([(64, 64)] * 9, PackConfig(seq_len=9, drop_rate=0.25), (0, 0)))
@example(([(300, 7)] * 9, PAPERS, (3, 4)))
@example(([(500, 500)] * 9, PackConfig(resolution=Side([224, 232]), seq_len=300), (0, 1)))
@example(([(90, 90)], PackConfig(resolution=Area(7000), drop_rate=Beta(0.2, 0.5)), (0, 1)))
@example(([(90, 90)] * 4, PackConfig(resolution=Budget([4, 9]), drop_rate=[0.1, 0.5]), (0, 1)))
@example(([(9, 500)] * 9, PackConfig(resolution=Square([64, 224]), seq_len=50), (0, 1)))
@example(([(9, 500)] * 9, PackConfig(resolution=Square(224), drop_rate=0.5, seq_len=50), (0, 1)))
def test_every_decision_is_its_slow_twin(case):
    sizes, config, key = case
    found = listed(decided(sizes, config, key))
    assert found == [
        naive.decide(height, width, config, *key, i) for i, (height, width) in enumerate(sizes)
    ]


@given(cases())
@example(([(2**31 - 1, 1), (2**31 - 1, 2**31 - 1)], PackConfig(seq_len=5), (0, 0)))
@example(
    ([(2**31 - 1, 1), (2**31 - 1, 2**31 - 1)], PackConfig(seq_len=5, drop_rate=0.999999), (0, 0))
)
def test_every_image_keeps_a_token_and_fits_into_a_pack(case):
    sizes, config, key = case
    found = decided(sizes, config, key)
    grids = found.grid_hw.astype(int)
    tokens = grids[:, 0] * grids[:, 1]
    assert (grids >= 1).all()
    assert (found.num_keep >= 1).all()
    assert (found.num_keep <= config.room).all()
    assert (found.num_keep <= tokens).all()
    assert (tokens <= config.token_limit).all()
    if not config.drops:
        assert (found.num_keep == tokens).all()
        assert found.drop_rate is None
    else:
        assert ((found.drop_rate >= 0) & (found.drop_rate < 1)).all()
    widths = [found.grid_hw.dtype, found.num_keep.dtype, found.shrunk.dtype]
    assert widths == [np.int16, np.int32, np.bool_]


@given(cases(), strategies.distributions(4, 400))
@example(([(9, 500)], PackConfig(seq_len=50, drop_rate=0.5), (0, 1)), 224)
@example(([(2**31 - 1, 1)], PackConfig(seq_len=50), (0, 1)), 1e9)
def test_squares_are_square_however_far_they_are_shrunk_and_much_is_dropped(case, pixels):
    sizes, config, key = case
    config = replace(config, resolution=Square(pixels), max_upscale=None)
    found = decided(sizes, config, key)
    sides = found.grid_hw[:, 0].astype(int)
    assert (found.grid_hw[:, 1] == sides).all()
    assert (sides**2 <= config.token_limit).all()
    assert (found.num_keep <= config.room).all()
    rounded = np.maximum(np.rint(found.drawn / config.patch_size), 1)
    assert (sides[~found.shrunk] == rounded[~found.shrunk]).all()
    assert (sides[found.shrunk] < rounded[found.shrunk]).all()
    # No size of an image matters, but for the draws of its number.
    other = decided([(7, 7)] * len(sizes), config, key)
    assert listed(other) == listed(found)


@given(cases(), st.data())
def test_decisions_about_some_images_are_part_of_those_about_all(case, data):
    sizes, config, key = case
    index = data.draw(
        st.lists(st.integers(0, 2**62), min_size=len(sizes), max_size=len(sizes), unique=True)
    )
    places = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1))
    whole = decided(sizes, config, key, index)
    part = decided([sizes[i] for i in places], config, key, [index[i] for i in places])
    for name, found in part._asdict().items():
        all_of_it = getattr(whole, name)
        assert (found is None) == (all_of_it is None)
        assert found is None or found.tolist() == all_of_it[places].tolist()


def test_any_order_of_calling_gives_the_same_decisions():
    order = np.random.default_rng(3).permutation(300)
    whole = decided(MANY, PAPERS, (5, 6))
    for i in order:
        alone = decided(MANY[i : i + 1], PAPERS, (5, 6), [i])
        assert listed(alone) == [listed(whole)[i]]
    assert len({keep for _, keep, _ in listed(whole)}) > 50


def test_any_number_of_images_is_decided_as_each_alone():
    config = replace(PAPERS, seq_len=100)
    sizes = np.random.default_rng(8).integers(1, 400, (40_000, 2))
    index = np.random.default_rng(9).permutation(10**6)[:40_000]
    grid_hw, num_keep, num_shrunk = decide_all(sizes, config, Key(1, 2), index=index)
    assert len(grid_hw) == len(num_keep) == 40_000
    # Both sides of every seam between the pieces that are decided at once.
    for i in {0, 1, 2**14 - 1, 2**14, 2**15 - 1, 2**15, 39_999, *range(0, 40_000, 400)}:
        wanted = naive.decide(*sizes[i].tolist(), config, 1, 2, int(index[i]))
        assert (tuple(grid_hw[i].tolist()), int(num_keep[i])) == wanted[:2]
    whole = decided(sizes, config, (1, 2), index)
    assert (whole.num_keep == num_keep).all()
    assert num_shrunk == whole.shrunk.sum() > 1000


def test_no_images_need_no_decisions():
    grid_hw, num_keep, num_shrunk = decide_all(
        np.empty((0, 2), np.int32), PAPERS, Key(0, 0), index=np.empty(0, np.int64)
    )
    assert grid_hw.shape == (0, 2)
    assert num_keep.shape == (0,)
    assert num_shrunk == 0


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        # No limit but seq_len, on what is kept: 400 tokens, of which 100 stay.
        (PackConfig(seq_len=100, drop_rate=0.75), (320, 320), ((20, 20), 100, False)),
        # 401 tokens would keep more.
        (PackConfig(seq_len=99, drop_rate=0.75), (320, 320), ((19, 19), 90, True)),
        # A limit before dropping.
        (
            PackConfig(seq_len=100, drop_rate=0.75, max_tokens=256),
            (320, 320),
            ((16, 16), 64, True),
        ),
        # One that lies above seq_len.
        (
            PackConfig(seq_len=64, drop_rate=0.75, max_tokens=300),
            (320, 320),
            ((16, 16), 64, True),
        ),
        # A square is shrunk to a square: of 14 patches a side, 7 at most are within 50 tokens.
        (PackConfig(seq_len=196, resolution=Square(224)), (9, 999), ((14, 14), 196, False)),
        (PackConfig(seq_len=50, resolution=Square(224)), (9, 999), ((7, 7), 49, True)),
        (PackConfig(max_tokens=9, resolution=Square(224)), (9, 999), ((3, 3), 9, True)),
        (
            PackConfig(seq_len=50, resolution=Square(224), drop_rate=0.5),
            (9, 999),
            ((10, 10), 50, True),
        ),
        # Blocks stay whole: of 18 x 24 patches, 6 x 8 are within 50 tokens, in blocks of 2 x 2.
        (PackConfig(seq_len=432, resolution=PixelRange()), (300, 400), ((18, 24), 432, False)),
        (PackConfig(seq_len=50, resolution=PixelRange()), (300, 400), ((6, 8), 48, True)),
        (PackConfig(seq_len=4, resolution=PixelRange()), (300, 400), ((2, 2), 4, True)),
        (
            PackConfig(seq_len=50, resolution=PixelRange(), drop_rate=0.5),
            (300, 400),
            ((8, 12), 48, True),
        ),
        (PackConfig(seq_len=400), (320, 320), ((20, 20), 400, False)),
        (PackConfig(seq_len=399), (320, 320), ((19, 19), 361, True)),
        (PackConfig(seq_len=399, max_tokens=100), (320, 320), ((10, 10), 100, True)),
        # One token always stays.
        (PackConfig(seq_len=9, drop_rate=0.99), (16, 48), ((1, 3), 1, False)),
        # int16 coordinates limit what has no other limit.
        (PackConfig(seq_len=9, drop_rate=0.9999), (16, 2**31 - 1), ((1, 32767), 3, True)),
    ],
)
def test_worked_limits(config, size, expected):
    assert listed(decided([size], config, (0, 0))) == [expected]


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # few are over seq_len
@given(cases(drops=True))
def test_an_image_over_seq_len_is_shrunk_at_the_same_rate_and_only_as_far_as_needed(case):
    sizes, config, key = case
    found = decided(sizes, config, key)
    room = replace(config, seq_len=2**15 - 1, max_tokens=config.token_limit)
    free = decided(sizes, room, key)
    over = free.num_keep > config.room
    assume(over.any())
    assert found.shrunk[over].all()
    for i in np.flatnonzero(over):
        # A larger scale's grid would keep too many, at this rate.
        assert found.drop_rate[i] == free.drop_rate[i]
        most = int(np.floor(config.room / (1 - found.drop_rate[i])))
        shown = naive.shown_hw(sizes[i], config, *key, i)
        wanted = naive.largest_grid(*shown, config, min(most, config.token_limit))
        assert tuple(found.grid_hw[i].tolist()) == wanted
    assert (found.grid_hw[~over] == free.grid_hw[~over]).all()
    assert (found.num_keep[~over] == free.num_keep[~over]).all()


def test_shrinking_never_goes_beyond_max_upscale():
    config = PackConfig(seq_len=20, resolution=Side(Uniform(64, 256)), max_upscale=1.0)
    sizes = np.random.default_rng(3).integers(1, 200, (2000, 2))
    found = decided(sizes, config, (1, 1))
    assert found.shrunk.sum() > 100
    assert (found.grid_hw <= np.ceil(sizes / 16)).all()


@given(cases(drops=False))
def test_the_drawn_value_is_told_if_there_is_one(case):
    sizes, config, key = case
    found = decided(sizes, config, key)
    assert (found.drawn is None) == isinstance(config.resolution, str)
    assert found.drop_rate is None
    if found.drawn is not None:
        law = config.resolution
        values = law.tokens if isinstance(law, Budget) else law.pixels
        for i, drawn in enumerate(found.drawn.tolist()):
            u = naive.uniform(*key, i, 6)
            assert drawn == pytest.approx(naive.quantile(values, u), rel=1e-9)


def test_sizes_and_rates_have_draws_of_their_own():
    same = np.full((20_000, 2), 500)
    config = PackConfig(resolution=Side(Uniform(64, 256)), drop_rate=Uniform(0, 0.8))
    found = decided(same, config, (1, 2))
    # Uncorrelated, to four standard errors.
    assert abs(np.corrcoef(found.drawn, found.drop_rate)[0, 1]) < 4 / 20_000**0.5
    other = decided(same, config, (1, 3))
    assert abs(np.corrcoef(found.drawn, other.drawn)[0, 1]) < 4 / 20_000**0.5
    assert abs(np.corrcoef(found.drop_rate[1:], found.drop_rate[:-1])[0, 1]) < 4 / 20_000**0.5


FALLING = OverTraining(0.2, 0.8, 2 / 3, -0.2)


def rates_in_order(config, key, num_images=300):
    """The rates of an epoch, in plan order."""
    order = naive.seeded_order(*key, range(num_images), 0)
    return decided(MANY[:num_images], config, key).drop_rate[order]


def test_a_schedule_follows_the_order_of_the_epoch_and_goes_on_in_the_next():
    config = PackConfig(drop_rate=FALLING, epochs=3)
    rates = np.concatenate([rates_in_order(config, (5, epoch)) for epoch in range(3)])
    assert len(rates) == 900
    assert (np.diff(rates) < 0).all()
    # The whole training is passed through, in even steps of progress: (n / N) to a few per cent.
    progress = FALLING.midpoint + FALLING.width * np.log((rates - 0.2) / (0.8 - rates))
    assert progress[0] >= 0
    assert progress[-1] < 1
    assert abs(progress - (np.arange(900) + 0.5) / 900).max() < 0.03


def test_a_rising_schedule_rises():
    config = PackConfig(drop_rate=OverTraining(0.2, 0.8, 0.5, 0.1), epochs=1.0)
    rates = rates_in_order(config, (0, 0))
    assert (np.diff(rates) > 0).all()
    assert rates[0] == pytest.approx(0.204, abs=0.002)
    assert rates[-1] == pytest.approx(0.796, abs=0.002)


def test_the_windows_of_a_plan_follow_the_schedule():
    config = PackConfig(drop_rate=FALLING, epochs=2, window=30, seq_len=600)
    plan = plan_epoch(MANY, config, seed=5, epoch=1)
    rates = decided(MANY, config, (5, 1)).drop_rate
    lowest = 1.0
    for window in np.split(rates[plan.order], 10):
        assert window.max() < lowest
        lowest = window.min()


def test_a_schedule_of_laws_still_draws_by_image():
    config = PackConfig(drop_rate=OverTraining(Uniform(0.1, 0.4), 0.9, 0.5, 1000), epochs=1)
    rates = decided(MANY, config, (0, 0)).drop_rate
    u = np.array([naive.uniform(0, 0, i, 7) for i in range(300)])
    halves = ((0.1 + 0.3 * u) + 0.9) / 2
    assert abs(rates - halves).max() < 1e-3
    assert len(np.unique(rates)) == 300


def test_other_images_and_their_number_do_not_matter_to_a_schedule():
    config = PackConfig(drop_rate=OverTraining(0.2, 0.8, 0.5, 0.1), epochs=1)
    whole = decided(MANY, config, (3, 0)).drop_rate
    some = decided(MANY[7:9], config, (3, 0), [7, 8]).drop_rate
    assert some.tolist() == whole[7:9].tolist()


def test_choices_of_rates_are_all_drawn():
    config = PackConfig(drop_rate=Choice((0.0, 0.5), (1, 3)), seq_len=1024)
    found = decided(MANY, config, (0, 0))
    assert set(found.drop_rate.tolist()) == {0.0, 0.5}
    share = (found.drop_rate == 0.5).mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 300) ** 0.5
