"""Hypothesis strategies: lengths, image sizes, configurations, real encoded images, keys."""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from packpipe.planning.crops import SHAPES, CenterCrop, Crop, CropLaw, FixedCrop
from packpipe.planning.distributions import (
    Beta,
    Choice,
    Constant,
    Distribution,
    TruncatedNormal,
    Uniform,
)
from packpipe.planning.dropping import ByResolution, DropLaw, OverTraining
from packpipe.planning.image_config import PackConfig
from packpipe.planning.resolution import Area, Budget, Resolution, Side, Square

WORDS = st.integers(0, 2**64 - 1)


class PackingCase(NamedTuple):
    lengths: list[int]
    seq_len: int
    max_segments: int | None


@st.composite
def packing_cases(
    draw: st.DrawFn,
    *,
    max_examples: int = 60,
    max_seq_len: int = 64,
    limited: bool | None = None,
) -> PackingCase:
    """Lengths of few or many distinct values, with a limit on segments or without."""
    seq_len = draw(st.integers(1, max_seq_len))
    values = draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=12))
    one = st.sampled_from(values) if draw(st.booleans()) else st.integers(1, seq_len)
    lengths = draw(st.lists(one, min_size=1, max_size=max_examples))
    limits = {None: st.none() | st.integers(1, 8), True: st.integers(1, 8), False: st.none()}
    return PackingCase(lengths, seq_len, draw(limits[limited]))


def image_sizes(max_side: int = 4000) -> st.SearchStrategy[tuple[int, int]]:
    """(height, width): anything, one pixel wide or high, square, and close to whole patches."""
    sides = st.integers(1, max_side)
    thin = st.tuples(st.just(1), sides)
    near = st.builds(
        lambda k, off: max(1, 16 * k + off), st.integers(1, 24), st.sampled_from([-8, -1, 0, 1, 8])
    )
    return st.one_of(
        st.tuples(sides, sides),
        thin,
        thin.map(lambda size: size[::-1]),
        sides.map(lambda side: (side, side)),
        st.tuples(near, near),
    )


def size_lists(min_size: int = 1, max_size: int = 40) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Sizes of the images of a source, mostly of a few tokens."""
    small = st.tuples(st.integers(1, 90), st.integers(1, 90))
    return st.lists(small | image_sizes(2000), min_size=min_size, max_size=max_size)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers in a range, its ends and whole ones among them."""
    whole = st.integers(int(-(-low // 1)), int(high // 1))
    return st.floats(low, high) | st.sampled_from([low, high]) | whole


@st.composite
def distributions(draw: st.DrawFn, low: float, high: float) -> Distribution:
    """Distributions of every kind over a part of low..high."""
    kind = draw(st.sampled_from(["constant", "uniform", "normal", "choice"]))
    if kind == "constant":
        return Constant(draw(numbers(low, high)))
    if kind == "choice":
        values = draw(st.lists(numbers(low, high), min_size=1, max_size=4))
        shares = st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))
        weights = draw(st.none() | shares.filter(any).map(tuple))
        return Choice(tuple(values), weights)
    start = draw(st.floats(low, low + 0.6 * (high - low)))
    stop = draw(st.floats(start + 0.2 * (high - low), high))
    if kind == "uniform":
        return Uniform(start, stop)
    mean = draw(st.floats(start - (stop - start), stop + (stop - start)))
    return TruncatedNormal(mean, draw(st.floats(0.3, 3)) * (stop - start), start, stop)


def crops() -> st.SearchStrategy[CropLaw]:
    """Crops of every kind, tiny boxes, thin ones and whole images among them."""
    share, shape = (
        st.sampled_from([0.001, 0.25, 0.5, 1.0]) | st.floats(0.01, 1),
        st.sampled_from(SHAPES),
    )
    aspects = st.sampled_from([(1, 1), (3 / 4, 4 / 3), (0.1, 0.2), (2, 9)])
    return st.one_of(
        st.builds(Crop, distributions(0.01, 1), aspects, shape),
        st.builds(CenterCrop, share, shape),
        st.builds(
            lambda top, left, height, width: FixedCrop(
                top, left, height * (1 - top), width * (1 - left)
            ),
            *(st.sampled_from([0, 0.3]) | st.floats(0, 0.999),) * 2,
            *(share,) * 2,
        ),
    )


def resolutions() -> st.SearchStrategy[Resolution]:
    """Resolution laws of every kind, for small packs."""
    rounding = st.sampled_from(["nearest", "floor", "ceil"])
    return st.one_of(
        st.sampled_from(["native", "budget"]),
        st.builds(Side, distributions(4, 150), rounding),
        st.builds(Area, distributions(16, 20_000), rounding),
        st.builds(Budget, distributions(1, 100)),
        st.builds(Square, distributions(4, 150), rounding),
    )


@st.composite
def betas(draw: st.DrawFn, largest: float = 0.9) -> Beta:
    """Beta laws, narrow and wide."""
    maximum = draw(st.floats(0.1, largest))
    return Beta(draw(st.floats(0.05, 0.95)) * maximum, maximum)


@st.composite
def by_resolutions(draw: st.DrawFn, largest: float = 0.9) -> ByResolution:
    """Laws that follow the token count, rising and falling."""
    deviation = draw(st.sampled_from([0, 0.02, 0.1]))
    rates = st.floats(2 * deviation, largest - 2 * deviation)
    least, most = draw(st.integers(0, 60)), draw(st.integers(1, 300))
    return ByResolution(least, draw(rates), least + most, draw(rates), deviation)


def drop_laws(largest: float = 0.9) -> st.SearchStrategy[DropLaw]:
    """Drop laws that do not change over the training."""
    return st.one_of(distributions(0, largest), betas(largest), by_resolutions(largest))


def schedules() -> st.SearchStrategy[OverTraining]:
    """Drop laws that do, rising and falling, of numbers and of laws."""
    rate = st.floats(0, 0.9) | drop_laws()
    width = st.floats(0.05, 1) | st.floats(-1, -0.05)
    return st.builds(OverTraining, rate, rate, st.floats(0, 1), width)


@st.composite
def configs(
    draw: st.DrawFn, *, max_seq_len: int = 96, max_window: int = 50, drops: bool | None = None
) -> PackConfig:
    """Small configurations, each option varied; with drops, all or none drop tokens."""
    seq_len = draw(st.integers(1, max_seq_len))
    prefix_tokens = draw(st.sampled_from([n for n in (0, 0, 1, 5) if n < seq_len]))
    none = st.just(0.0)
    some = st.floats(0.01, 0.9) | drop_laws() | schedules()
    drop_rate = draw({None: none | some, True: some, False: none}[drops])
    resolution = draw(resolutions())
    upscales = st.none() | st.sampled_from([0.3, 1, 1.5, 4])
    return PackConfig(
        seq_len=seq_len,
        patch_size=draw(st.sampled_from([1, 8, 14, 16, 32])),
        crop=draw(st.none() | crops()),
        resolution=resolution,
        max_tokens=draw(st.none() | st.integers(1, seq_len - prefix_tokens)),
        max_upscale=None if isinstance(resolution, Square) else draw(upscales),
        drop_rate=drop_rate,
        # Keys may have any epoch, so the training is longer than any.
        epochs=2.0**65 if isinstance(drop_rate, OverTraining) else None,
        fit_last=draw(st.sampled_from([None, "drop_rate", "resolution"])),
        fit_limit=draw(st.sampled_from([0.1, 0.25, 1, 10])),
        max_segments=draw(st.sampled_from([1, 2, 3, 64])),
        strategy=draw(st.sampled_from(["balanced", "ffd", "next_fit", "best_fit"])),
        window=draw(st.integers(1, max_window)),
        prefix_tokens=prefix_tokens,
    )


def keys() -> st.SearchStrategy[tuple[int, int]]:
    """(seed, epoch), small, large and at the ends of 64 bits."""
    word = st.integers(0, 5) | WORDS | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1])
    return st.tuples(word, word)


class EncodedImage(NamedTuple):
    encoded: bytes
    image_hw: tuple[int, int]  # upright
    format: str
    mode: str


MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "RGB"),
}


def encode(image: Image.Image, format: str, **options: object) -> bytes:  # noqa: A002
    """The bytes of an image file."""
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def random_image(mode: str, height: int, width: int, seed: int = 0) -> Image.Image:
    """Random pixels of a mode."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode in ("1", "P"):
        return Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)).convert(mode)
    data = rng.integers(0, 256, (height, width, bands), np.uint8)
    return Image.frombytes(mode, (width, height), data.tobytes())


@st.composite
def encoded_images(draw: st.DrawFn, *, max_side: int = 40) -> EncodedImage:
    """Real files in varied formats and modes, some with an EXIF orientation."""
    format = draw(st.sampled_from(sorted(MODES)))  # noqa: A001
    mode = draw(st.sampled_from(MODES[format]))
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    image = random_image(mode, height, width, draw(st.integers(0, 99)))
    options = {}
    image_hw = height, width
    if format != "GIF":
        orientation = draw(st.integers(1, 8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
        image_hw = (width, height) if orientation >= 5 else (height, width)
    return EncodedImage(encode(image, format, **options), image_hw, format, mode)
