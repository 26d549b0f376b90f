from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import FrozenInstanceError

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from packpipe import philox
from packpipe.philox import Key
from packpipe.planning.distributions import Beta, Choice, Constant, TruncatedNormal, Uniform
from packpipe.planning.dropping import (
    ByResolution,
    OverTraining,
    drop_rates,
    kept_tokens,
    law,
    num_kept,
)

UNITS = st.floats(0, 1 - 2**-53)
TOKENS = st.integers(1, 1000)
# NaViT's: r ~ U(64, 384) in patches of 16 pixels, 0.25 around a half.
PAPERS = ByResolution(16, 0.25, 576, 0.75)


def rate(drop, u, num_tokens=1, progress=None):
    at = None if progress is None else np.array([progress])
    (found,) = drop_rates(drop, np.array([u]), np.array([num_tokens]), at).tolist()
    return found


@given(TOKENS, st.floats(0, 1, exclude_max=True))
@example(1, 0.999)
@example(5, 0.5)  # 2.5: half to even
@example(7, 0.5)  # 3.5
@example(3, 0.9)
@example(1000, 0.0)
@example(32767, 0.999999)
def test_the_tokens_kept_are_the_nearest_number_and_one_at_least(num_tokens, drop_rate):
    (found,) = num_kept(np.array([num_tokens]), np.array([drop_rate])).tolist()
    assert found == naive.num_kept(num_tokens, drop_rate)
    assert 1 <= found <= num_tokens
    assert found == 1 or abs(found - num_tokens * (1 - drop_rate)) <= 0.5


def test_worked_numbers_of_tokens_kept():
    found = num_kept(np.array([256, 5, 7, 1, 10, 4]), np.array([0.5, 0.5, 0.5, 0.9, 0.0, 0.99]))
    assert found.dtype == np.int64
    assert found.tolist() == [128, 2, 4, 1, 10, 1]


@given(strategies.drop_laws(), UNITS, TOKENS)
@example(PAPERS, 0.0, 16)
@example(PAPERS, 0.5, 1)
@example(PAPERS, 0.99, 1000)
@example(Beta(0.25, 0.7), 0.1, 1)
def test_every_law_is_its_slow_twin(drop, u, num_tokens):
    found = rate(drop, u, num_tokens)
    assert found == pytest.approx(naive.drop_rate(drop, u, num_tokens, None), rel=1e-9, abs=1e-9)
    least, largest = drop.support
    assert least <= found <= largest


@given(strategies.schedules(), UNITS, TOKENS, st.floats(0, 1.5))
def test_every_schedule_is_its_slow_twin(drop, u, num_tokens, progress):
    found = rate(drop, u, num_tokens, progress)
    wanted = naive.drop_rate(drop, u, num_tokens, progress)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    least, largest = drop.support
    assert least - 1e-12 <= found <= largest + 1e-12


@given(strategies.by_resolutions(), UNITS, st.integers(1, 700))
@example(ByResolution(0, 0.04, 9, 0.5), 0.0, 1)
def test_by_resolution_stays_within_two_deviations_of_a_linear_mean(drop, u, num_tokens):
    place = (num_tokens - drop.min_tokens) / (drop.max_tokens - drop.min_tokens)
    place = min(max(place, 0), 1)
    mean = drop.min_rate + place * (drop.max_rate - drop.min_rate)
    found = rate(drop, u, num_tokens)
    assert abs(found - mean) <= 2 * drop.deviation + 1e-12
    away = stats.truncnorm.ppf(u, -2, 2) * drop.deviation
    assert found == pytest.approx(mean + away, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "mean"),
    [(1, 0.25), (16, 0.25), (156, 0.375), (296, 0.5), (576, 0.75), (577, 0.75), (30_000, 0.75)],
)
def test_the_papers_rates_by_resolution(num_tokens, mean):
    assert rate(PAPERS, 0.5, num_tokens) == pytest.approx(mean, abs=1e-12)
    assert rate(PAPERS, 0.0, num_tokens) == pytest.approx(mean - 0.04, abs=1e-12)
    assert rate(PAPERS, 1 - 2**-53, num_tokens) == pytest.approx(mean + 0.04, abs=1e-12)
    u = philox.uniform(Key(3, 4), index=np.arange(100_000), stream=philox.DROP_RATE)
    rates = drop_rates(PAPERS, u, np.full(100_000, num_tokens), None)
    # A normal cut at two deviations has 0.8796 of its deviation; four standard errors.
    assert abs(rates.mean() - mean) < 4 * 0.02 / 100_000**0.5
    assert rates.std() == pytest.approx(0.02 * stats.truncnorm.std(-2, 2), rel=0.01)


RISING = OverTraining(0.2, 0.8, 0.5, 0.1)
FAST_FALLING = OverTraining(0.2, 0.8, 0.5, -0.1)
SLOW_FALLING = OverTraining(0.2, 0.8, 2 / 3, -0.2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (RISING, [0.204, 0.246, 0.500, 0.754, 0.796]),
        (FAST_FALLING, [0.796, 0.754, 0.500, 0.246, 0.204]),
        (SLOW_FALLING, [0.779, 0.734, 0.618, 0.438, 0.295]),
    ],
    ids=["rising", "fast falling", "slow falling"],
)
def test_the_papers_schedules_pass_through_their_points(schedule, expected):
    progress = np.array([0, 0.25, 0.5, 0.75, 1])
    found = drop_rates(schedule, np.full(5, 0.3), np.full(5, 100), progress)
    assert np.round(found, 3).tolist() == expected


@given(strategies.drop_laws(), strategies.drop_laws(), UNITS, TOKENS, st.floats(0, 1))
def test_a_schedule_of_laws_mixes_their_quantiles_at_one_draw(low, high, u, num_tokens, progress):
    found = rate(OverTraining(low, high, 0.4, 0.3), u, num_tokens, progress)
    share = 1 / (1 + np.exp(-(progress - 0.4) / 0.3))
    ends = [naive.drop_rate(end, u, num_tokens, None) for end in (low, high)]
    assert found == pytest.approx(ends[0] + share * (ends[1] - ends[0]), rel=1e-9, abs=1e-9)


def test_a_schedule_of_the_papers_beta_and_of_the_law_by_resolution():
    schedule = OverTraining(Beta(0.25, 0.7), PAPERS, 0.5, 0.001)
    for u in (0.1, 0.5, 0.9):
        beta = stats.beta.ppf(u, 7 / 3 * 0.25 / 0.7, 7 / 3 * 0.45 / 0.7) * 0.7
        assert rate(schedule, u, 576, 0.0) == pytest.approx(beta, abs=1e-4)
        normal = 0.75 + 0.02 * stats.truncnorm.ppf(u, -2, 2)
        assert rate(schedule, u, 576, 1.0) == pytest.approx(normal, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0.5, Constant(0.5)),
        (0, Constant(0)),
        ([0.1, 0.2], Choice((0.1, 0.2))),
        (Uniform(0, 0.5), Uniform(0, 0.5)),
        (PAPERS, PAPERS),
        (RISING, RISING),
    ],
)
def test_a_number_is_a_constant_and_a_list_a_choice(value, found):
    assert law("drop_rate", value) == found


@pytest.mark.parametrize(
    ("drop", "support"),
    [
        (PAPERS, (0.25 - 0.04, 0.75 + 0.04)),
        (ByResolution(16, 0.75, 576, 0.25, 0.1), (0.25 - 0.2, 0.75 + 0.2)),
        (RISING, (0.2, 0.8)),
        (OverTraining(Uniform(0.3, 0.6), Beta(0.1, 0.5), 0.5, 1), (0, 0.6)),
    ],
)
def test_a_law_knows_its_ends(drop, support):
    assert drop.support == pytest.approx(support)


def test_laws_are_frozen_and_hashable():
    assert len({PAPERS, ByResolution(16, 0.25, 576, 0.75, 0.02), RISING, SLOW_FALLING}) == 3
    with pytest.raises(FrozenInstanceError):
        PAPERS.deviation = 3


def test_a_list_within_a_schedule_is_a_choice():
    listed = OverTraining([0.1, 0.2], 0.8, 0.5, 0.1)
    chosen = OverTraining(Choice((0.1, 0.2)), 0.8, 0.5, 0.1)
    assert listed == chosen
    assert hash(listed) == hash(chosen)


NUMBER = "expected a number; pass a number"
WITHIN = "expected rates in [0, 1); it is the share that is dropped, and one token has to stay"
OR_LAW = "expected a number; or pass a distribution, such as Uniform(64, 256)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: law("drop_rate", 1.0), ValueError, f"drop_rate is 1.0, {WITHIN}"),
        (lambda: law("drop_rate", -0.1), ValueError, f"drop_rate is -0.1, {WITHIN}"),
        (lambda: law("drop_rate", [0.5, 1]), ValueError, f"drop_rate is [0.5, 1], {WITHIN}"),
        (
            lambda: law("drop_rate", Uniform(0.5, 1)),
            ValueError,
            f"drop_rate is Uniform(low=0.5, high=1), {WITHIN}",
        ),
        (
            lambda: law("drop_rate", TruncatedNormal(0, 1, -0.5, 0.5)),
            ValueError,
            f"drop_rate is TruncatedNormal(mean=0, deviation=1, low=-0.5, high=0.5), {WITHIN}",
        ),
        (
            lambda: law("drop_rate", Beta(0.5, 1)),
            ValueError,
            f"drop_rate is Beta(mean=0.5, maximum=1), {WITHIN}",
        ),
        (
            lambda: law("drop_rate", ByResolution(1, 0.03, 2, 0.5)),
            ValueError,
            (
                "drop_rate is ByResolution(min_tokens=1, min_rate=0.03, max_tokens=2, "
                f"max_rate=0.5, deviation=0.02), {WITHIN}"
            ),
        ),
        (lambda: law("drop_rate", "half"), TypeError, f"drop_rate is 'half', {OR_LAW}"),
        (lambda: law("drop_rate", None), TypeError, f"drop_rate is None, {OR_LAW}"),
        (lambda: law("drop_rate", False), TypeError, f"drop_rate is False, {OR_LAW}"),
        (lambda: OverTraining(1.2, 0.5, 0.5, 1), ValueError, f"low is 1.2, {WITHIN}"),
        (lambda: OverTraining(0.2, "0.5", 0.5, 1), TypeError, f"high is '0.5', {OR_LAW}"),
        (lambda: OverTraining(0.2, 0.5, None, 1), TypeError, f"midpoint is None, {NUMBER}"),
        (
            lambda: OverTraining(0.2, 0.5, 0.5, 0),
            ValueError,
            "width is 0, expected not 0; pass 0.001 for a step",
        ),
        (
            lambda: OverTraining(0.2, 0.5, 0.5, float("inf")),
            ValueError,
            "width is inf, expected a finite number; pass a number",
        ),
        (lambda: ByResolution("1", 0.2, 5, 0.3), TypeError, f"min_tokens is '1', {NUMBER}"),
        (lambda: ByResolution(1, [0.2], 5, 0.3), TypeError, f"min_rate is [0.2], {NUMBER}"),
        (
            lambda: ByResolution(5, 0.2, 5, 0.3),
            ValueError,
            "min_tokens is 5, expected 0 or more, below 5 (max_tokens); swap them",
        ),
        (
            lambda: ByResolution(-1, 0.2, 5, 0.3),
            ValueError,
            "min_tokens is -1, expected 0 or more, below 5 (max_tokens); swap them",
        ),
        (
            lambda: ByResolution(1, 0.2, 5, 0.3, -0.1),
            ValueError,
            "deviation is -0.1, expected 0 or more; 0.02 is the paper's",
        ),
    ],
)
def test_bad_laws_are_named(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


@st.composite
def choices(draw):
    """(index, tokens, tokens kept) of some images: all, one and any number of them kept."""
    index = draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=12, unique=True))
    num_tokens = [draw(st.integers(1, 60)) for _ in index]
    num_keep = [draw(st.sampled_from([1, n]) | st.integers(1, n)) for n in num_tokens]
    return index, num_tokens, num_keep


def kept(key, index, num_tokens, num_keep):
    """The kept tokens of each image."""
    found = kept_tokens(
        Key(*key),
        index=np.array(index, np.int64),
        num_tokens=np.array(num_tokens),
        num_keep=np.array(num_keep),
    )
    assert found.dtype == np.int32
    return [part.tolist() for part in np.split(found, np.cumsum(num_keep)[:-1])]


@given(strategies.keys(), choices())
@example((0, 0), ([7, 3], [9, 4], [4, 4]))
def test_exactly_the_tokens_asked_for_are_kept_in_raster_order(key, case):
    _, num_tokens, num_keep = case
    found = kept(key, *case)
    assert list(map(len, found)) == num_keep
    for tokens, n in zip(found, num_tokens, strict=True):
        assert 0 <= tokens[0] <= tokens[-1] < n
        assert all(a < b for a, b in itertools.pairwise(tokens))


@given(strategies.keys(), choices())
@example((2**64 - 1, 2**63), ([0, 2**62], [1, 60], [1, 59]))
def test_the_kept_tokens_are_chosen_by_numpys_words(key, case):
    assert kept(key, *case) == [
        naive.subset(*key, i, philox.KEPT_TOKENS, n, k) for i, n, k in zip(*case, strict=True)
    ]


@given(strategies.keys(), choices(), st.data())
def test_an_images_kept_tokens_can_be_chosen_again_alone(key, case, data):
    whole = kept(key, *case)
    places = data.draw(st.lists(st.sampled_from(range(len(whole))), min_size=1))
    some = [[column[place] for place in places] for column in case]
    assert kept(key, *some) == [whole[place] for place in places]


def test_a_large_image_is_the_naive_one():
    assert kept((5, 6), [11], [32767], [20_000]) == [
        naive.subset(5, 6, 11, philox.KEPT_TOKENS, 32767, 20_000)
    ]


def test_no_images_keep_no_tokens():
    none = np.empty(0, np.int64)
    found = kept_tokens(Key(0, 0), index=none, num_tokens=none, num_keep=none)
    assert found.shape == (0,)


IMAGES = 40_000


def test_every_subset_is_kept_alike():
    found = kept((1, 1), np.arange(IMAGES), np.full(IMAGES, 6), np.full(IMAGES, 3))
    counts = Counter(map(tuple, found))
    assert sorted(counts) == sorted(itertools.combinations(range(6), 3))
    # All within 4.5 standard errors, and together as their chi-squared asks.
    error = (IMAGES * 0.05 * 0.95) ** 0.5
    assert max(abs(count - IMAGES / 20) for count in counts.values()) < 4.5 * error
    assert 0.001 < stats.chisquare(list(counts.values())).pvalue < 0.999


def test_every_token_and_every_pair_of_tokens_is_kept_alike():
    n, k = 50, 20
    found = kept((1, 2), np.arange(IMAGES), np.full(IMAGES, n), np.full(IMAGES, k))
    has = np.zeros((IMAGES, n))
    has[np.repeat(np.arange(IMAGES), k), np.concatenate(found)] = 1
    together = has.T @ has
    single, pair = k / n, k * (k - 1) / (n * (n - 1))
    # Five standard errors: 1,275 frequencies are looked at.
    error = (IMAGES * single * (1 - single)) ** 0.5
    assert abs(np.diag(together) - IMAGES * single).max() < 5 * error
    pairs = together[np.triu_indices(n, 1)]
    error = (IMAGES * pair * (1 - pair)) ** 0.5
    assert abs(pairs - IMAGES * pair).max() < 5 * error


def test_every_seed_epoch_and_image_keep_other_tokens():
    keys = [((0, 0), 0), ((0, 1), 0), ((1, 0), 0), ((1, 1), 0), ((0, 2), 0), ((0, 0), 1)]
    found = {str(kept(key, [index], [200], [100])) for key, index in keys}
    assert len(found) == len(keys)
