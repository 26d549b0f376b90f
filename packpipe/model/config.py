"""`NaViTConfig`: the shape of a model, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from packpipe import checks
from packpipe.model.attention import BACKENDS
from packpipe.model.pooling import POOLINGS
from packpipe.model.positions import POSITIONS, default_side

# dim, depth, heads, MLP width (ViT; DeiT for Ti; SigLIP for So400m).
PRESETS = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
}
HEADS = ("linear", "unit")


@dataclass(frozen=True, kw_only=True)
class NaViTConfig:
    """The shape of a NaViT.

    Attributes:
        num_classes: logits, or channels of an embedding; None returns the pooled features, of dim.
        patch_size: pixels a side of a patch, as the rows were packed with.
        dim: channels, a multiple of heads.
        depth: transformer blocks.
        heads: attention heads.
        mlp_dim: width of the MLPs; None is 4 · dim.
        position: one of `packpipe.model.positions.POSITIONS`. NaViT found the default best.
        max_side: places on each axis of the position table. With absolute tables an image may have
            no more patches an axis; other tables are interpolated. None takes the kind's default.
        pooling: of a segment's tokens: ``"attention"`` (MAP), ``"mean"``, ``"max"``, ``"first"``,
            or ``"none"``: an output a token, for dense maps.
        head: ``"linear"``, or ``"unit"`` for outputs of length 1 (embeddings).
        attention: backend, one of `packpipe.model.attention.BACKENDS`; ``"auto"`` is the fastest on
            the model's device.

    Raises:
        TypeError, ValueError: an attribute has a wrong type, is out of range, or does not fit dim.
    """

    num_classes: int | None
    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_dim: int | None = None
    position: str = "factorised_absolute_sum"
    max_side: int | None = None
    pooling: str = "attention"
    head: str = "linear"
    attention: str = "auto"

    def __post_init__(self) -> None:
        # patch_size as in PackConfig; max_side as large as coordinates get, which are int16.
        limits = {"patch_size": 128, "max_side": 2**15 - 1}
        optional = ("num_classes", "mlp_dim", "max_side")
        for name in ("num_classes", "patch_size", "dim", "depth", "heads", "mlp_dim", "max_side"):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            most = limits.get(name, 2**31 - 1)
            number = checks.whole_number(name, value, 1, most, "choose a usual size")
            object.__setattr__(self, name, number)  # the class is frozen
        if self.dim % self.heads:
            expected = f"a multiple of {self.heads} (heads)"
            raise ValueError(checks.sentence("dim", self.dim, expected, "change dim or heads"))
        checks.choice("position", self.position, POSITIONS, "choose a position embedding")
        checks.choice("pooling", self.pooling, POOLINGS, "choose a pooling")
        checks.choice("head", self.head, HEADS, "choose a head")
        checks.choice("attention", self.attention, ("auto", *BACKENDS), "choose a backend")
        # Channels are split in two for two axes, or for sin and cos, and in four for both.
        parts = {"sinusoidal": 4, "fourier": 2}.get(self.position.split("_")[0], 1)
        parts = 2 if self.position.endswith("stack") else parts
        if self.dim % parts:
            expected = f"a multiple of {parts} with position={self.position!r}"
            raise ValueError(checks.sentence("dim", self.dim, expected, "change dim or position"))
        # A head's channels turn in pairs, half of the pairs by y and half by x.
        if self.position == "rotary" and self.dim // self.heads % 4:
            found, expected = self.dim // self.heads, "a multiple of 4 with position='rotary'"
            raise ValueError(checks.sentence("dim ÷ heads", found, expected, "change dim or heads"))

    @classmethod
    def preset(cls, name: str, **options: Any) -> NaViTConfig:
        """Return a named shape: ``preset("B/16", num_classes=1000)``.

        Args:
            name: "Ti", "S", "B", "L" or "So400m", a slash and the patch size.
            **options: other attributes; patch_size, dim, depth, heads and mlp_dim are the name's.

        >>> NaViTConfig.preset("S/14", num_classes=10).dim
        384
        """
        size, _, patch = name.partition("/")
        if size not in PRESETS or not patch.isdecimal():
            known = ", ".join(PRESETS)
            expected = f"one of {known} and a patch size, such as 'B/16'"
            raise ValueError(checks.sentence("name", name, expected, "or pass dim, depth, heads"))
        dim, depth, heads, mlp_dim = PRESETS[size]
        return cls(
            patch_size=int(patch), dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, **options
        )

    @property
    def mlp_width(self) -> int:
        """Width of the MLPs."""
        return 4 * self.dim if self.mlp_dim is None else self.mlp_dim

    @property
    def side(self) -> int:
        """Places an axis of the position table."""
        return default_side(self.position) if self.max_side is None else self.max_side
