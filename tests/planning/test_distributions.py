from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import naive
import numpy as np
import pytest
import strategies
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import integrate, stats

from packpipe import philox
from packpipe.philox import Key
from packpipe.planning.distributions import (
    DISTRIBUTIONS,
    Beta,
    Choice,
    Constant,
    TruncatedNormal,
    Uniform,
    between,
    distribution,
)

JUST_BELOW_1 = 1 - 2**-53
SHARES = np.array([0, 2**-53, 1e-9, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-9, JUST_BELOW_1])
UNITS = st.floats(0, JUST_BELOW_1)
BETAS = strategies.betas(largest=1)
ANY = strategies.distributions(-50, 400) | BETAS

DRAWS = 10**6
U = philox.uniform(Key(1, 2), index=np.arange(DRAWS), stream=philox.RESOLUTION)


def standard_error(values):
    return values.std() / len(values) ** 0.5


def value_of(law, u):
    found = law.quantile(np.array([u]))
    assert found.dtype == np.float64
    assert found.shape == (1,)
    return float(found[0])


@given(ANY, UNITS)
@example(Choice((3, 1, 2), (0, 1, 0)), 0.0)
@example(Choice((3, 1, 2), (0, 1, 0)), JUST_BELOW_1)
@example(Choice((1, 2), (0.1, 0.7)), JUST_BELOW_1)
def test_every_value_lies_in_the_support(law, u):
    least, largest = law.support
    for share in (u, 0.0, JUST_BELOW_1):
        assert least <= value_of(law, share) <= largest


@given(
    strategies.distributions(-50, 400).filter(lambda law: not isinstance(law, Choice)) | BETAS,
    st.lists(UNITS, min_size=2, max_size=20),
)
def test_a_larger_share_never_gives_a_smaller_value(law, shares):
    assert (np.diff(law.quantile(np.sort(shares))) >= 0).all()


@given(ANY, st.lists(UNITS, min_size=1, max_size=20))
def test_a_value_depends_on_its_own_share_only(law, shares):
    together = law.quantile(np.array(shares))
    assert together.tolist() == [value_of(law, u) for u in shares]


def test_between_two_numbers_lies_a_uniform_and_between_equal_ones_the_number():
    assert between(64, 256) == Uniform(64, 256)
    assert between(64, 64) == Constant(64)
    with pytest.raises(ValueError, match=re.escape("high is 64, expected above 256 (low)")):
        between(256, 64)


def test_the_ends_are_reached():
    assert Uniform(64, 256).quantile(np.array([0.0]))[0] == 64
    assert value_of(Uniform(64, 256), JUST_BELOW_1) == pytest.approx(256, rel=1e-12)
    assert value_of(TruncatedNormal(0, 1, -1, 2), 0.0) == -1
    assert value_of(TruncatedNormal(0, 1, -1, 2), JUST_BELOW_1) == pytest.approx(2, rel=1e-12)
    assert value_of(Beta(0.3, 0.7), 0.0) == 0
    assert value_of(Beta(0.3, 0.7), JUST_BELOW_1) == pytest.approx(0.7, rel=1e-12)
    assert value_of(Constant(7), 0.0) == value_of(Constant(7), JUST_BELOW_1) == 7


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), UNITS)
def test_uniform_is_scipys(low, width, u):
    law = Uniform(low, low + width)
    wanted = stats.uniform.ppf(u, loc=low, scale=law.high - low)
    assert value_of(law, u) == pytest.approx(wanted, rel=1e-12, abs=1e-9)


@given(
    st.floats(-100, 100),
    st.floats(0.1, 50),
    st.floats(-25, 25),
    st.floats(0.1, 20),
    st.floats(1e-6, 1 - 1e-6),
)
@example(0.0, 1.0, 8.0, 1.0, 0.5)  # the share below low is 1 - 6e-16
@example(0.0, 1.0, -9.0, 1.0, 0.5)
@example(0.0, 1.0, 25.0, 1.0, 0.999)
@example(0.0, 1.0, -1.0, 2.0, 0.25)
@example(224.0, 160.0, -1.0, 2.0, 0.25)
def test_truncated_normal_is_scipys_in_the_tails_too(mean, deviation, start, width, u):
    low, high = mean + deviation * start, mean + deviation * (start + width)
    found = value_of(TruncatedNormal(mean, deviation, low, high), u)
    ends = (low - mean) / deviation, (high - mean) / deviation
    wanted = stats.truncnorm.ppf(u, *ends)
    assert (found - mean) / deviation == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    if min(map(abs, ends)) > 1 and ends[0] * ends[1] > 0:
        assert low < found < high  # not just one of its ends


@given(st.floats(-25, 25), st.floats(0.1, 20), st.floats(1e-6, 1 - 1e-6))
def test_truncated_normal_scales_and_shifts(start, width, u):
    plain = value_of(TruncatedNormal(0, 1, start, start + width), u)
    moved = value_of(TruncatedNormal(30, 5, 30 + 5 * start, 30 + 5 * (start + width)), u)
    assert moved == pytest.approx(30 + 5 * plain, abs=1e-6)


@given(BETAS, UNITS)
@example(Beta(0.1, 0.7), 0.0)
@example(Beta(0.5, 0.7), JUST_BELOW_1)
def test_beta_is_scipys_to_one_cell_of_the_table(law, u):
    alpha = 7 / 3 * law.mean / law.maximum
    share = stats.beta.cdf(value_of(law, u) / law.maximum, alpha, 7 / 3 - alpha)
    assert abs(share - u) < 2**-14 + 1e-12
    assert value_of(law, u) == pytest.approx(naive.quantile(law, u), rel=1e-9, abs=1e-300)


@given(BETAS, st.integers(0, 2**14 - 1))
@example(Beta(0.25, 0.7), 1)
@example(Beta(0.25, 0.7), 2**14 - 1)
def test_beta_is_exact_at_the_tables_own_shares(law, cell):
    alpha = 7 / 3 * law.mean / law.maximum
    wanted = law.maximum * stats.beta.ppf(cell / 2**14, alpha, 7 / 3 - alpha)
    assert value_of(law, cell / 2**14) == pytest.approx(wanted, rel=1e-12, abs=1e-300)


@given(strategies.distributions(-50, 400), UNITS)
def test_every_law_is_its_slow_twin(law, u):
    assert value_of(law, u) == pytest.approx(naive.quantile(law, u), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("law", "shares", "values"),
    [
        (Choice((5, 1, 3)), [0, 0.33, 0.34, 0.66, 0.67, JUST_BELOW_1], [5, 5, 1, 1, 3, 3]),
        (Choice((5, 1), (3, 1)), [0, 0.74, 0.75, 0.99], [5, 5, 1, 1]),
        (Choice((5, 1, 3), (0, 2, 0)), [0, 0.5, JUST_BELOW_1], [1, 1, 1]),
        (Choice((5, 1, 3), (1, 0, 1)), [0, 0.49, 0.5, JUST_BELOW_1], [5, 5, 3, 3]),
        (Choice((7,)), [0, JUST_BELOW_1], [7, 7]),
    ],
)
def test_choice_gives_each_value_its_share_in_the_order_given(law, shares, values):
    assert law.quantile(np.array(shares)).tolist() == values


def test_choice_draws_by_weight():
    values, counts = np.unique(
        Choice((64, 128, 96), (1, 2, 5)).quantile(U[:100_000]), return_counts=True
    )
    assert values.tolist() == [64, 96, 128]
    for found, share in zip(counts / 100_000, (1 / 8, 5 / 8, 2 / 8), strict=True):
        assert abs(found - share) < 4 * (share * (1 - share) / 100_000) ** 0.5


@pytest.mark.parametrize(
    ("law", "support"),
    [
        (Constant(3), (3, 3)),
        (Uniform(64, 256), (64, 256)),
        (TruncatedNormal(9, 1, 2, 4), (2, 4)),
        (Beta(0.1, 0.7), (0, 0.7)),
        (Choice((5, 1, 3), (0, 1, 0)), (1, 5)),
    ],
)
def test_a_law_knows_its_ends(law, support):
    assert law.support == support


# NaViT's ablation: a number in [-1, 1], spread linearly over the sides or over the areas.
ON_UNIT = {
    "U(-1,1)": None,
    "N_t(0,1)": 0.0,
    "N_t(-0.5,1)": -0.5,
}


def spread(name, low, high):
    middle, half = (low + high) / 2, (high - low) / 2
    if ON_UNIT[name] is None:
        return Uniform(low, high)
    return TruncatedNormal(middle + ON_UNIT[name] * half, half, low, high)


@pytest.mark.parametrize(
    ("name", "mean_side", "mean_tokens"),
    [("U(-1,1)", 224.0, 229.2), ("N_t(0,1)", 224.0, 225.1), ("N_t(-0.5,1)", 201.0, 185.8)],
)
def test_the_papers_side_laws_have_the_exact_means(name, mean_side, mean_tokens):
    sides = spread(name, 64, 384).quantile(U)
    assert sides.min() >= 64
    assert sides.max() <= 384
    # Four standard errors (some 0.4 and 0.6), beside the rounding of the figure.
    assert abs(sides.mean() - mean_side) < 0.05 + 4 * standard_error(sides)
    tokens = sides**2 / 256
    assert abs(tokens.mean() - mean_tokens) < 0.05 + 4 * standard_error(tokens)


@pytest.mark.parametrize(
    ("name", "mean_side", "mean_tokens"),
    [("U(-1,1)", 262.0, 295.9), ("N_t(0,1)", 263.9, 296.0), ("N_t(-0.5,1)", 243.0, 255.8)],
)
def test_the_papers_area_laws_have_the_exact_means(name, mean_side, mean_tokens):
    areas = spread(name, 64**2, 384**2).quantile(U)
    assert areas.min() >= 64**2
    assert areas.max() <= 384**2
    sides = np.sqrt(areas)
    assert abs(sides.mean() - mean_side) < 0.05 + 4 * standard_error(sides)
    tokens = areas / 256
    assert abs(tokens.mean() - mean_tokens) < 0.05 + 4 * standard_error(tokens)


def test_the_classification_law_has_112_tokens_on_average():
    tokens = Uniform(64, 256).quantile(U) ** 2 / 256
    assert abs(tokens.mean() - 112) < 4 * standard_error(tokens)
    exact = integrate.quad(lambda u: (64 + 192 * u) ** 2 / 256, 0, 1)[0]
    assert exact == pytest.approx(112)


@pytest.mark.parametrize(("mean", "percent"), [(0.10, 67.2), (0.25, 27.3), (0.50, 2.4)])
def test_the_papers_beta_drops_less_than_a_tenth_as_often_as_it_should(mean, percent):
    rates = Beta(mean, 0.7).quantile(U)
    share = percent / 100
    error = (share * (1 - share) / DRAWS) ** 0.5
    # Rounding of the figure, a cell of the table, four standard errors.
    assert abs((rates < 0.1).mean() - share) < 0.0005 + 2**-14 + 4 * error


@pytest.mark.parametrize(("mean", "maximum"), [(0.10, 0.7), (0.25, 0.7), (0.50, 0.7), (0.3, 0.9)])
def test_beta_has_its_mean_and_variance(mean, maximum):
    rates = Beta(mean, maximum).quantile(U)
    share = mean / maximum
    variance = maximum**2 * 0.3 * share * (1 - share)
    assert abs(rates.mean() - mean) < 4 * standard_error(rates)
    squares = (rates - mean) ** 2
    assert abs(squares.mean() - variance) < 4 * standard_error(squares)


@pytest.mark.parametrize("law", [Uniform(-3, 8), TruncatedNormal(2, 5, -3, 8), Beta(0.2, 0.7)])
def test_draws_fill_ten_shares_alike(law):
    ends = law.quantile(np.arange(10) / 10)
    found = np.bincount(np.searchsorted(ends, law.quantile(U), side="right") - 1, minlength=10)
    # Four standard errors of a tenth: 1,200 of 100,000.
    assert (abs(found - DRAWS / 10) < 4 * (DRAWS * 0.09) ** 0.5).all()


@pytest.mark.parametrize(
    ("value", "law"),
    [
        (3, Constant(3)),
        (0.25, Constant(0.25)),
        (np.float32(0.25), Constant(0.25)),
        (np.int16(7), Constant(7)),
        ([1, 2], Choice((1, 2))),
        ((1, 2.5), Choice((1, 2.5))),
        (Uniform(1, 2), Uniform(1, 2)),
        (Beta(0.1, 0.2), Beta(0.1, 0.2)),
    ],
)
def test_a_number_is_a_constant_and_a_list_a_choice(value, law):
    assert distribution("side", value) == law


@pytest.mark.parametrize(
    "law",
    [
        Constant(1),
        Uniform(1, 2),
        TruncatedNormal(0, 1, 2, 3),
        Beta(0.1, 0.2),
        Choice([1, 2], [1, 2]),
    ],
    ids=lambda law: type(law).__name__,
)
def test_laws_are_frozen_plain_and_hashable(law):
    assert type(law) in DISTRIBUTIONS
    assert replace(law) == law
    assert hash(replace(law)) == hash(law)
    with pytest.raises(FrozenInstanceError):
        law.low = 3


def test_numpy_numbers_become_plain_ones():
    law = TruncatedNormal(np.float32(0.5), np.int64(2), np.int8(-1), np.float64(3.5))
    assert [type(value) for value in (law.mean, law.deviation, law.low, law.high)] == [
        float,
        int,
        int,
        float,
    ]
    assert {type(value) for value in Choice([np.int64(1), np.int8(2)]).values} == {int}


NUMBER = "expected a number; pass a number"
FINITE = "expected a finite number; pass a number"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant("1"), TypeError, f"value is '1', {NUMBER}"),
        (lambda: Constant(True), TypeError, f"value is True, {NUMBER}"),
        (lambda: Constant(float("nan")), ValueError, f"value is nan, {FINITE}"),
        (lambda: Constant(1 + 1j), TypeError, f"value is (1+1j), {NUMBER}"),
        (lambda: Uniform(None, 1), TypeError, f"low is None, {NUMBER}"),
        (lambda: Uniform(0, float("inf")), ValueError, f"high is inf, {FINITE}"),
        (
            lambda: Uniform(256, 64),
            ValueError,
            "high is 64, expected above 256 (low); change them",
        ),
        (
            lambda: Uniform(-1e308, 1e308),
            ValueError,
            "high - low is inf, expected a finite number above low; choose a smaller range",
        ),
        (lambda: Uniform(5, 5), ValueError, "high is 5, expected above 5 (low); change them"),
        (lambda: TruncatedNormal("0", 1, 2, 3), TypeError, f"mean is '0', {NUMBER}"),
        (lambda: TruncatedNormal(0, [1], 2, 3), TypeError, f"deviation is [1], {NUMBER}"),
        (
            lambda: TruncatedNormal(0, 0, 2, 3),
            ValueError,
            "deviation is 0, expected above 0; pass Constant(mean) for none",
        ),
        (
            lambda: TruncatedNormal(0, -1.5, 2, 3),
            ValueError,
            "deviation is -1.5, expected above 0; pass Constant(mean) for none",
        ),
        (
            lambda: TruncatedNormal(0, 1, 3, 2),
            ValueError,
            "high is 2, expected above 3 (low); change them",
        ),
        (
            lambda: TruncatedNormal(0, 1, 50, 60),
            ValueError,
            (
                "(low, high) is (50, 60), expected a range that holds a share of the distribution; "
                "move the mean towards it, or raise the deviation"
            ),
        ),
        (lambda: Beta("a", 1), TypeError, f"mean is 'a', {NUMBER}"),
        (lambda: Beta(0.1, None), TypeError, f"maximum is None, {NUMBER}"),
        (
            lambda: Beta(0, 0.7),
            ValueError,
            "mean is 0, expected above 0 and below 0.7 (maximum); pass a mean within",
        ),
        (
            lambda: Beta(0.7, 0.7),
            ValueError,
            "mean is 0.7, expected above 0 and below 0.7 (maximum); pass a mean within",
        ),
        (
            lambda: Beta(-0.1, -0.05),
            ValueError,
            "mean is -0.1, expected above 0 and below -0.05 (maximum); pass a mean within",
        ),
        (
            lambda: Choice(()),
            ValueError,
            "values is (), expected a tuple of numbers; pass one or more",
        ),
        (
            lambda: Choice(5),
            ValueError,
            "values is 5, expected a tuple of numbers; pass one or more",
        ),
        (lambda: Choice((1, "2")), TypeError, f"values[1] is '2', {NUMBER}"),
        (lambda: Choice((1, 2), (1, float("inf"))), ValueError, f"weights[1] is inf, {FINITE}"),
        (
            lambda: Choice((1, 2), 5),
            ValueError,
            "weights is 5, expected a tuple of numbers; pass one or more",
        ),
        (
            lambda: Choice((1, 2), (1,)),
            ValueError,
            "len(weights) is 1, expected 2 (values); one a value",
        ),
        (
            lambda: Choice((1, 2), (2, -1)),
            ValueError,
            "weights is (2, -1), expected 0 or more each, above 0 together; pass shares",
        ),
        (
            lambda: Choice((1, 2), [0, 0]),
            ValueError,
            "weights is (0, 0), expected 0 or more each, above 0 together; pass shares",
        ),
        (
            lambda: distribution("side", "224"),
            TypeError,
            "side is '224', expected a number; or pass a distribution, such as Uniform(64, 256)",
        ),
        (
            lambda: distribution("side", float("inf")),
            ValueError,
            (
                "side is inf, expected a finite number; "
                "or pass a distribution, such as Uniform(64, 256)"
            ),
        ),
        (
            lambda: distribution("side", Uniform),
            TypeError,
            (
                f"side is {Uniform!r}, expected a number; "
                "or pass a distribution, such as Uniform(64, 256)"
            ),
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


# Exact laws, and laws that rest on the C library; one file of values for each process.
_DRAWN = """
import sys
import numpy as np
from packpipe import philox
from packpipe.philox import Key
from packpipe.planning.distributions import Beta, Choice, Constant, TruncatedNormal, Uniform
from packpipe.planning.dropping import ByResolution, OverTraining, drop_rates, num_kept
from packpipe.planning.resolution import Area, Side, Square, patch_grids

u = philox.uniform(Key(1, 2), index=np.arange(100_000), stream=philox.RESOLUTION)
exact = Constant(0.1), Uniform(0.1, 0.7), Choice((0.1, 0.3, 0.7), (0.1, 0.2, 0.3))
found = {f"exact {law}": law.quantile(u) for law in exact}
hw = 1 + np.stack([np.arange(len(u)) * 7 % 1999, np.arange(len(u)) * 11 % 1777], axis=1)
for law in Side(Uniform(64, 256)), Area(Uniform(4096, 65536)), Square(Choice((64.5, 99.9))):
    for max_upscale in (None, 1.1)[: 1 if isinstance(law, Square) else 2]:
        grids, pixels = patch_grids(law, hw, 16, 1024, u=u, max_upscale=max_upscale)
        found[f"exact {law} {max_upscale}"] = grids
        found[f"exact pixels {law} {max_upscale}"] = pixels
tokens = 1 + np.arange(len(u)) % 1024
for law in (
    Beta(0.5, 0.8),
    TruncatedNormal(0.5, 0.2, 0.1, 0.9),
    ByResolution(64, 0.2, 1024, 0.8),
    OverTraining(0.2, Beta(0.5, 0.8), 0.5, 0.1),
):
    rates = drop_rates(law, u, tokens, np.arange(len(u)) / len(u))
    found[f"close {law}"] = rates
    found[f"exact tokens {law}"] = num_kept(tokens, rates)
np.savez(sys.argv[1], **found)
"""


def drawn(path, environment):
    command = [sys.executable, "-c", _DRAWN, str(path)]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    with np.load(path) as file:
        return dict(file)


def test_other_instructions_of_the_processor_change_no_value_but_in_its_last_bits(tmp_path):
    usual = drawn(tmp_path / "usual.npz", {})
    # NumPy without what it found, and glibc's functions without fused products.
    plain = drawn(
        tmp_path / "plain.npz",
        {
            "NPY_DISABLE_CPU_FEATURES": " ".join(
                np.show_config("dicts")["SIMD Extensions"]["found"]
            ),
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2,-AVX512F",
        },
    )
    assert usual.keys() == plain.keys()
    exact = [name for name in usual if name.startswith("exact")]
    assert len(exact) == 17
    for name in exact:
        assert np.array_equal(usual[name], plain[name]), name
    for name in usual.keys() - exact:
        assert len(np.unique(usual[name])) > 10_000
        np.testing.assert_allclose(plain[name], usual[name], rtol=1e-14, atol=1e-15)


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9), st.lists(UNITS, min_size=1, max_size=20))
def test_uniform_values_are_those_of_ieee_754_operation_by_operation(low, width, units):
    law = Uniform(low, low + width)
    found = law.quantile(np.array(units)).tolist()
    assert found == [min(law.low + u * (law.high - law.low), law.high) for u in units]
