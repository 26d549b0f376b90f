"""`PackConfig`: every option that decides a packed row of images, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from packpipe import checks
from packpipe.planning import crops, dropping, resolution, views
from packpipe.planning.crops import Crop, CropLaw
from packpipe.planning.dropping import DropLaw, OverTraining
from packpipe.planning.image_options import (
    BEFORE,
    DAMAGED_SCANS,
    FILTERS,
    FIT_LAST,
    JPEG_EDGES,
    MAX_IMAGE_SEQ_LEN,
    MAX_PIXELS,
    MOST_PIXELS,
    PIXELS,
    PLAN_STRATEGIES,
    PROFILES,
    checked_colour,
    checked_range,
    positive,
)
from packpipe.planning.law_values import plain, restored
from packpipe.planning.resolution import PixelRange, Resolution, Square
from packpipe.planning.views import View


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Everything that decides a packed row, in addition to the source and (seed, epoch).

    Attributes:
        seq_len: tokens a pack holds, 1..32767.
        patch_size: side of a patch in pixels, 1..128.
        crop: the part of each image that is packed: `Crop`, a random box, another one every epoch;
            `CenterCrop` or `FixedCrop`, for evaluation; None for the whole image. To all options
            that follow, the box is the image.
        resolution: ``"native"`` (own size), ``"budget"`` (the largest size within max_tokens, as
            NaFlex), or a size that is drawn: `Side`, `Area`, `Budget` or `Square` (which does not
            keep the aspect ratio) of a distribution; or `PixelRange`, the own size in whole blocks
            of patches, as Qwen-VL's models take it.
        max_tokens: most tokens of one image before dropping, 1..32767; a larger one is shrunk.
            None: at most seq_len tokens are kept, less prefix_tokens; with "budget", as many before
            dropping.
        max_upscale: most an image's sides may be enlarged by; None for no limit. "native" never
            enlarges, and `Square` and `PixelRange` do not allow this option.
        drop_rate: share of an image's tokens that is dropped, in [0, 1): a number, a distribution,
            `ByResolution` or `OverTraining`.
        epochs: length of the training, for a drop rate that changes over it.
        fit_last: fills a pack's leftover tokens by letting one of its images grow: with
            ``"drop_rate"`` it keeps more of its tokens, with ``"resolution"`` it may also get a
            larger size. None leaves the rest as padding.
        fit_limit: most that this image's token count may grow by, as a share of it.
        max_segments: most images a pack may hold.
        strategy: packing rule, any of `pack_lengths` but "optimal" and "nnlshp". "balanced" keeps
            packs of tiny images from reaching max_segments while they are half empty.
        window: most examples planned together, in seeded order; a larger one pads less. A drop rate
            that changes over the training differs between windows; within one, packs are shuffled.
        background: (red, green, blue) in 0..255 that transparent pixels are laid on.
        reducing_gap: 1.0 or more. Before the resize, a JPEG is decoded at a fraction of its size
            and any image averaged by whole factors, as long as it stays this many times as large
            as planned; as in Pillow's ``Image.thumbnail``. None resizes in one step.
        downscale_filter: resampling along an axis that shrinks: "bicubic", "lanczos", "hamming",
            "bilinear" or "box", all antialiased, or "nearest".
        upscale_filter: resampling along an axis that grows, one of the same filters.
        max_pixels: an image with more pixels is rejected before anything is allocated. JPEGs are
            decoded at a fraction of their size; other images take 4 bytes a pixel and more, and
            TIFF files of more than 178,956,970 pixels stay rejects.
        profiles: ``"srgb"`` converts colours to sRGB by an image's ICC profile or PNG chunks, and
            rejects images of a high dynamic range; ``"ignore"`` takes all numbers as they are, as
            versions without this option did.
        damaged_scans: what becomes of a JPEG that is damaged within its pixels: "reject", where
            that is seen while decoding; "strict" decodes a second time, with simplejpeg, and
            rejects whatever libjpeg warns of; "keep" makes a row of what libjpeg made of it, as
            versions without this option did.
        value_range: (low, high), the values that become black and white in images of one channel
            of 32-bit floating point (TIFF, PFM), of signed integers of 16 or 32 bits, or of
            unsigned ones of 32, if little-endian (TIFF): scaled linearly to 0..255 before the
            resize, values outside clipped, NaN black. None: such images are rejects.
        views: segments of each image, each with a crop, a size and kept tokens of its own; and, at
            a loader, with flips and colours. View 0 is what one view alone would be. Or their laws,
            `View(...)` of each: crop, resolution and max_tokens are then theirs.
        views_together: whether the views of an image share a row. It takes max_tokens of at most
            seq_len ÷ views (of several laws: all views' sum to at most seq_len), and max_segments
            of at least views; more rows are partly empty.
        jpeg_edges: a JPEG that is decoded at a fraction of its size may end in what its encoder
            padded it with. "clean" decodes such images at a finer fraction where the padding shows;
            "padded" takes them as they come, as versions without this option did.
        prefix_tokens: slots before the patches of each segment, for a model that learns what stands
            in them, such as a class token and registers (`NaViTConfig.prefix_tokens`). They count
            in seq_len and ``seq_lens``; max_tokens, budgets and drop rates are of patches alone.
        pixels: what decodes and resizes: "pillow", or "turbo" (``packpipe[turbo]``), which decodes
            JPEGs with simplejpeg, plain PNG and WebP files with imagecodecs, and resizes everything
            with a kernel of its own, in one step whatever reducing_gap is; others are decoded by
            Pillow. Rows differ by .1 to .2 levels in the mean, and are made again, or verified,
            with the same engine alone.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is out of range; ``name is VALUE, expected REQUIREMENT; remedy``.
    """

    seq_len: int = 1024
    patch_size: int = 16
    crop: CropLaw | None = None
    resolution: Resolution = "native"
    max_tokens: int | None = None
    max_upscale: float | None = None
    drop_rate: float | DropLaw = 0.0
    epochs: float | None = None
    fit_last: str | None = None
    fit_limit: float = 0.25
    max_segments: int = 64
    strategy: str = "balanced"
    window: int = 65536
    background: tuple[int, int, int] = (255, 255, 255)
    reducing_gap: float | None = 1.0
    downscale_filter: str = "bicubic"
    upscale_filter: str = "bicubic"
    max_pixels: int = MAX_PIXELS
    profiles: str = "srgb"
    damaged_scans: str = "reject"
    value_range: tuple[float, float] | None = None
    views: int | tuple[View, ...] = 1
    views_together: bool = False
    jpeg_edges: str = "clean"
    prefix_tokens: int = 0
    pixels: str = "pillow"

    def __post_init__(self) -> None:
        limits = {
            "seq_len": (1, MAX_IMAGE_SEQ_LEN, "coordinates are int16, so choose a shorter row"),
            "patch_size": (1, 128, "patches of 8 to 32 pixels are usual"),
            "max_segments": (1, 2**31 - 1, "a row must be allowed to hold an image"),
            "window": (1, 2**62, "1024 or more keeps padding low"),
            "max_pixels": (1, MOST_PIXELS, "a JPEG has no more pixels"),
        }
        for name, (low, high, remedy) in limits.items():
            # The dataclass is frozen; a NumPy integer becomes an int, so that to_dict is plain
            # JSON.
            number = checks.whole_number(name, getattr(self, name), low, high, remedy)
            object.__setattr__(self, name, number)
        remedy = "an image needs a token of its own"
        slots = checks.whole_number(
            "prefix_tokens", self.prefix_tokens, 0, self.seq_len - 1, remedy
        )
        object.__setattr__(self, "prefix_tokens", slots)
        drop_rate = dropping.canonical("drop_rate", self.drop_rate)
        object.__setattr__(self, "drop_rate", drop_rate)
        if self.max_tokens is not None:
            # An image that drops tokens may have more than a pack before dropping.
            most = MAX_IMAGE_SEQ_LEN if self.drops else self.room
            remedy = "an image must fit into a row, so raise seq_len or lower max_tokens"
            limit = checks.whole_number("max_tokens", self.max_tokens, 1, most, remedy)
            object.__setattr__(self, "max_tokens", limit)
        for name in ("max_upscale", "epochs", "fit_limit"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        if self.epochs is None and self.uses_progress:
            remedy = "pass the number of epochs of the training"
            raise ValueError(checks.sentence("epochs", None, "a number, for OverTraining", remedy))
        if self.fit_last is not None:
            checks.choice("fit_last", self.fit_last, FIT_LAST, "or None for padding")
        crops.checked(self.crop)
        resolution.checked(self.resolution)
        if self.max_upscale is not None and isinstance(self.resolution, Square):
            remedy = "a square is as large whatever the image, so leave it out or use Side"
            raise ValueError(
                checks.sentence("max_upscale", self.max_upscale, "None, for Square", remedy)
            )
        if isinstance(self.resolution, PixelRange):
            self._check_range()
        checks.choice("strategy", self.strategy, PLAN_STRATEGIES, "choose a packing rule")
        object.__setattr__(self, "background", checked_colour(self.background))
        if self.reducing_gap is not None:
            remedy = "None decodes in full and resizes in one step"
            gap = checks.real_number("reducing_gap", self.reducing_gap, remedy)
            if gap < 1:
                raise ValueError(checks.sentence("reducing_gap", gap, "1.0 or more", remedy))
            object.__setattr__(self, "reducing_gap", float(gap))
        for name in ("downscale_filter", "upscale_filter"):
            checks.choice(name, getattr(self, name), FILTERS, "choose a resampling filter")
        checks.choice("profiles", self.profiles, PROFILES, "choose what colour profiles do")
        remedy = "choose what becomes of them"
        checks.choice("damaged_scans", self.damaged_scans, DAMAGED_SCANS, remedy)
        checks.choice("jpeg_edges", self.jpeg_edges, JPEG_EDGES, remedy)
        checks.choice("pixels", self.pixels, PIXELS, "choose what decodes and resizes")
        object.__setattr__(self, "value_range", checked_range(self.value_range))
        object.__setattr__(
            self, "views_together", checks.boolean("views_together", self.views_together)
        )
        object.__setattr__(self, "views", views.checked(self.views))
        if isinstance(self.views, tuple):
            self._check_laws()
        if self.views_together:
            self._check_together()

    def _check_range(self) -> None:
        """Raise ValueError if an option does not go with a range of pixels."""
        if self.max_upscale is not None:
            expected, remedy = "None, for PixelRange", "min_pixels says what is enlarged"
            raise ValueError(checks.sentence("max_upscale", self.max_upscale, expected, remedy))
        if self.fit_last == "resolution":
            expected, remedy = "None or 'drop_rate', for PixelRange", "sizes are the law's"
            raise ValueError(checks.sentence("fit_last", self.fit_last, expected, remedy))
        block = resolution.grid_multiple(self.resolution) ** 2
        limits = {f"seq_len{self._less()}": self.room, "max_tokens": self.max_tokens}
        for name, limit in limits.items():
            if limit is not None and limit < block:
                expected, remedy = f"at least {block} (grid_multiple²)", "an image has a block"
                raise ValueError(checks.sentence(name, limit, expected, remedy))

    def _check_laws(self) -> None:
        """Raise ValueError if an option is given that is one of each view's law."""
        remedy = "pass it to View"
        for name in ("crop", "resolution", "max_tokens"):
            usual = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != usual:
                expected = f"{usual!r} beside the laws of views"
                raise ValueError(checks.sentence(name, getattr(self, name), expected, remedy))
        if self.fit_last == "resolution":
            expected, remedy = "None or 'drop_rate', with laws of views", "sizes are the laws'"
            raise ValueError(checks.sentence("fit_last", self.fit_last, expected, remedy))
        self.laws()  # raises if an option and a law do not go together

    def _check_together(self) -> None:
        """Raise ValueError if the views of an image may not fit into one row."""
        if self.num_views == 1:
            expected = "False with one view"
            raise ValueError(checks.sentence("views_together", True, expected, "pass views=2"))
        most = self.seq_len // self.num_views - self.prefix_tokens
        remedy = "lower it, or raise seq_len"
        if isinstance(self.views, tuple):
            each = [(view.count, view.max_tokens) for view in self.views]
            if any(limit is None for _, limit in each):
                expected = "a number in every View, for views_together"
                raise ValueError(checks.sentence("max_tokens", None, expected, remedy))
            total = sum(count * limit for count, limit in each if limit is not None)
            room = self.seq_len - self.num_views * self.prefix_tokens
            if total > room:
                expected = f"at most {room} (seq_len{self._less()}), for views_together"
                raise ValueError(
                    checks.sentence("max_tokens of all views", total, expected, remedy)
                )
        elif self.max_tokens is None or self.max_tokens > most:
            of = f"seq_len ÷ {self.views} views{self._less()}"
            expected = f"at most {most} ({of}), for views_together"
            raise ValueError(checks.sentence("max_tokens", self.max_tokens, expected, remedy))
        if self.max_segments < self.num_views:
            expected = f"at least {self.num_views} (views), for views_together"
            remedy = "a row holds all views of an image"
            raise ValueError(checks.sentence("max_segments", self.max_segments, expected, remedy))

    def _less(self) -> str:
        return ", less prefix_tokens" if self.prefix_tokens else ""

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._told())
        return f"PackConfig({told})"

    @property
    def drops(self) -> bool:
        """Whether any tokens may be dropped."""
        return self.drop_rate != 0

    @property
    def uses_progress(self) -> bool:
        """Whether an image's decision depends on how far the training is."""
        return isinstance(self.drop_rate, OverTraining)

    @property
    def draws(self) -> bool:
        """Whether an image's decision depends on (seed, epoch, index), besides its size."""
        return self.drops or any(
            isinstance(law.crop, Crop) or resolution.is_drawn(law.resolution)
            for _, law in self.laws()
        )

    @property
    def crops(self) -> bool:
        """Whether any view of an image is a part of it."""
        return any(law.crop is not None for _, law in self.laws())

    @property
    def num_views(self) -> int:
        """How many segments each image is."""
        return self.views if isinstance(self.views, int) else sum(v.count for v in self.views)

    def laws(self) -> list[tuple[int, PackConfig]]:
        """Return the first view of each law, and the options of an image with that view alone."""
        if isinstance(self.views, int):
            return [(0, self)]
        found, first = [], 0
        for view in self.views:
            law = replace(
                self,
                crop=view.crop,
                resolution=view.resolution,
                max_tokens=view.max_tokens,
                views=1,
                views_together=False,
            )
            found.append((first, law))
            first += view.count
        return found

    def law_of(self, view: int) -> PackConfig:
        """Return the options by which one view is decided."""
        return [law for first, law in self.laws() if first <= view][-1]

    @property
    def token_limit(self) -> int:
        """Most tokens of one image before dropping."""
        if self.max_tokens is not None:
            return self.max_tokens
        # "budget" enlarges every image to its budget, so there it cannot be unlimited.
        unlimited = self.drops and self.resolution != "budget"
        return MAX_IMAGE_SEQ_LEN if unlimited else self.room

    @property
    def room(self) -> int:
        """Most patches that one image may keep: seq_len less prefix_tokens."""
        return self.seq_len - self.prefix_tokens

    @property
    def longest(self) -> int:
        """Most tokens of an image, of any view: those it may keep, and its prefix tokens."""
        return max(min(law.token_limit, law.room) + law.prefix_tokens for _, law in self.laws())

    @property
    def patch_bytes(self) -> int:
        """Bytes of one patch: patch_size² × 3."""
        return self.patch_size**2 * 3

    @property
    def row_bytes(self) -> int:
        """Bytes of all patches of one row: seq_len · patch_bytes."""
        return self.seq_len * self.patch_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values; a law is ``{its name: {its attributes}}``."""
        return {name: plain(getattr(self, name)) for name in self._told()}

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: object = "packing") -> PackConfig:
        """Return the configuration that `to_dict` described.

        Args:
            options: by name.
            source: where they were read, for errors.

        Raises:
            ValueError: an option, a law or an attribute of one is unknown here.
        """
        checks.known_options(options, [field.name for field in fields(cls)], source)
        return cls(**BEFORE | {name: restored(value, source) for name, value in options.items()})

    def to_options(self) -> dict[str, Any]:
        """Return the options by name, as `pack`, `EpochPacks` and `predict` take them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def as_before(self) -> PackConfig:
        """Return the configuration as it was before the options of `BEFORE` were there."""
        return replace(self, **BEFORE)

    def _told(self) -> list[str]:
        """Return the names of the options that identify this configuration."""
        names = [field.name for field in fields(self)]
        return [n for n in names if n not in BEFORE or getattr(self, n) != BEFORE[n]]


def config_from(seq_len: int, options: dict[str, Any]) -> PackConfig:
    """Return the configuration of seq_len and keyword options; an unknown one is refused."""
    known = [field.name for field in fields(PackConfig)]
    for name in options:
        if name == "transform":
            # Stored rows are made again, for a build that goes on and by `verify`; a function may
            # be another one by then.
            expected = "left out where rows are stored, which must be made again from their source"
            remedy = "pass it to EpochPacks or PackedStream, or apply the function with map before"
            raise TypeError(checks.sentence("option", name, expected, remedy))
        if name in ("weight_column", "mask_column", "target_stride"):
            expected = "left out here, where rows have neither weights nor targets"
            raise TypeError(
                checks.sentence("option", name, expected, "use packpipe.pack or EpochPacks")
            )
        if name not in known:
            raise TypeError(
                checks.sentence("option", name, "one of " + ", ".join(known), "check its spelling")
            )
    return PackConfig(seq_len=seq_len, **options)
