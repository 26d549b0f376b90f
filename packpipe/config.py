"""The configuration: every choice that decides a packed row, checked when made (floor 0)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from packpipe import checks
from packpipe.packing import STRATEGIES
from packpipe.resolution import LAWS

# "optimal" depends on how much a machine gets done in its budget, which a plan must not; "nnlshp"
# is there to compare with.
PLAN_STRATEGIES = tuple(name for name in STRATEGIES if name not in ("optimal", "nnlshp"))

# Coordinates are stored as int16, and one image may be seq_len patches wide.
MAX_IMAGE_SEQ_LEN = 2**15 - 1
# The limit above which Pillow refuses to open an image.
MAX_PIXELS = 178_956_970


class PackOptions(TypedDict, total=False):
    """The options of `PackConfig` besides ``seq_len``, as keyword arguments."""

    patch_size: int
    resolution: str
    max_tokens: int | None
    max_segments: int
    strategy: str
    window: int
    background: tuple[int, int, int]
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Everything that decides a packed row, besides the source and (seed, epoch).

    Attributes:
        seq_len: tokens a pack holds, 1..32767.
        patch_size: pixels a side of a patch, 1..128.
        resolution: ``"native"`` (own size, shrunk only over max_tokens) or ``"budget"``
            (the largest size within max_tokens, as NaFlex).
        max_tokens: most tokens of one image; None means seq_len.
        max_segments: most images a pack may hold.
        strategy: packing rule, as for `pack_lengths`. "balanced" keeps rows of tiny images
            from reaching max_segments while they are half empty.
        window: examples planned together, in seeded order; a larger one pads less.
        background: (red, green, blue) in 0..255 that transparent pixels are laid on.
        max_pixels: an image with more pixels is rejected before anything is allocated.

    Raises:
        TypeError, ValueError: ``name is VALUE, expected REQUIREMENT; remedy``.
    """

    seq_len: int = 1024
    patch_size: int = 16
    resolution: str = "native"
    max_tokens: int | None = None
    max_segments: int = 64
    strategy: str = "balanced"
    window: int = 16384
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        limits = {
            "seq_len": (1, MAX_IMAGE_SEQ_LEN, "coordinates are int16, so choose a shorter pack"),
            "patch_size": (1, 128, "patches of 8 to 32 pixels are usual"),
            "max_segments": (1, 2**31 - 1, "a pack must be allowed to hold an image"),
            "window": (1, 2**62, "1024 or more keeps padding low"),
            "max_pixels": (1, MAX_PIXELS, "Pillow opens no larger image"),
        }
        for name, (low, high, remedy) in limits.items():
            number = checks.whole_number(name, getattr(self, name), low, high, remedy)
            object.__setattr__(self, name, number)
        if self.max_tokens is not None:
            remedy = "an image must fit into a pack, so raise seq_len or lower max_tokens"
            limit = checks.whole_number("max_tokens", self.max_tokens, 1, self.seq_len, remedy)
            object.__setattr__(self, "max_tokens", limit)
        checks.choice("resolution", self.resolution, LAWS, "choose how images are sized")
        checks.choice("strategy", self.strategy, PLAN_STRATEGIES, "choose a packing rule")
        object.__setattr__(self, "background", _checked_colour(self.background))

    @property
    def token_limit(self) -> int:
        """Most tokens of one image."""
        return self.seq_len if self.max_tokens is None else self.max_tokens

    @property
    def patch_bytes(self) -> int:
        """Bytes of one patch: patch_size² × 3."""
        return self.patch_size**2 * 3

    @property
    def row_bytes(self) -> int:
        """Bytes of the patches of one row."""
        return self.seq_len * self.patch_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {**asdict(self), "background": list(self.background)}


def config_from(seq_len: int, options: dict[str, Any]) -> PackConfig:
    """Return the configuration of seq_len and keyword options; an unknown one is refused."""
    known = [field.name for field in fields(PackConfig)]
    for name in options:
        if name not in known:
            raise TypeError(
                checks.sentence("option", name, "one of " + ", ".join(known), "check its spelling")
            )
    return PackConfig(seq_len=seq_len, **options)


def _checked_colour(colour: Any) -> tuple[int, int, int]:
    remedy = "white is (255, 255, 255)"
    try:
        red, green, blue = colour
    except (TypeError, ValueError):
        expected = "(red, green, blue) in 0..255"
        raise ValueError(checks.sentence("background", colour, expected, remedy)) from None
    return (
        checks.whole_number("background[0]", red, 0, 255, remedy),
        checks.whole_number("background[1]", green, 0, 255, remedy),
        checks.whole_number("background[2]", blue, 0, 255, remedy),
    )
