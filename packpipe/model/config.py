"""`NaViTConfig`: the shape of a model, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from packpipe import checks
from packpipe.model.activation import ACTIVATIONS
from packpipe.model.attention import BACKENDS
from packpipe.model.pooling import POOLINGS
from packpipe.model.positions import POSITIONS, RESIZES, ROTARY, default_side
from packpipe.model.presets import preset_of

HEADS = ("linear", "unit")
_FLAGS = (
    *("bias", "qk_norm", "gated", "norm_embed", "norm_pooled", "norm_out"),
    *("antialias", "keep_aspect"),
)


@dataclass(frozen=True, kw_only=True)
class NaViTConfig:
    """The shape of a NaViT.

    The defaults are NaViT's. The switches from bias on are what pretrained encoders differ in.

    Attributes:
        num_classes: logits, or channels of an embedding; None returns the pooled features, of dim.
        patch_size: pixels a side of a patch, as the rows were packed with.
        dim: channels, a multiple of heads.
        depth: transformer blocks.
        heads: attention heads.
        mlp_dim: width of the MLPs; None is 4 · dim.
        position: one of `packpipe.model.positions.POSITIONS`. NaViT found the default best.
        max_side: places on each axis of the position table. With absolute tables an image may have
            no more patches an axis; other tables are interpolated. With ``"resized"`` a token needs
            4 · max_side² bytes for its weights. None takes the kind's default.
        pooling: of a segment's tokens: ``"attention"`` (MAP), ``"mean"``, ``"max"``, ``"first"``,
            or ``"none"``: an output a token, for dense maps.
        target_stride: of a model without pooling: pixels a side of a cell, which divide patch_size;
            every token then has num_classes logits for each of its cells, as rows packed with
            ``mask_column`` have targets. None gives num_classes a token.
        head: ``"linear"``, or ``"unit"`` for outputs of length 1 (embeddings).
        attention: backend, one of `packpipe.model.attention.BACKENDS`; ``"auto"`` is the fastest on
            the model's device.
        bias: whether linear maps and norms have biases. Keys have none: without rotary positions
            it would add the same to all logits of a query, which softmax does not see.
        qk_norm: whether queries and keys are normalised, also the keys of the pool: learning rates
            may be higher, but weights trained without it need it off.
        activation: of the MLPs, one of `packpipe.model.activation.ACTIVATIONS`.
        gated: whether one half of a block's hidden layer, activated, is multiplied with the other;
            with ``"silu"`` that is SwiGLU.
        norm_eps: what layer norms add to the variance: flat images tell 1e-5 from 1e-6.
        layer_scale: at first, the factor of each channel that a block adds, learned (CaiT); None
            adds blocks as they are. Deep models start near the identity with 1e-5.
        prefix_tokens: learned tokens before the patches of each image, such as a class token and
            registers, which find room in rows packed with as many. Pooling leaves them out, but for
            ``"first"``, which takes the first of them.
        norm_embed: whether embedded patches are normalised before the blocks, as in CLIP.
        norm_pooled: whether the last norm comes after the pooling ``"mean"``, ``"max"`` or
            ``"first"`` instead of before it, as in CLIP and for means in timm.
        norm_out: whether what the attention pool returns is normalised; SigLIP's is not.
        resize: how ``position="resized"`` fits its table to a grid, ``"bilinear"`` or
            ``"bicubic"``: each encoder needs the one it was trained with.
        antialias: whether a resized table is averaged where a grid has fewer places than it has.
        keep_aspect: whether both axes of a resized table are resized to a grid's longer side.

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
    target_stride: int | None = None
    head: str = "linear"
    attention: str = "auto"
    bias: bool = False
    qk_norm: bool = True
    activation: str = "gelu"
    gated: bool = False
    norm_eps: float = 1e-5
    layer_scale: float | None = None
    prefix_tokens: int = 0
    norm_embed: bool = False
    norm_pooled: bool = False
    norm_out: bool = True
    resize: str = "bilinear"
    antialias: bool = True
    keep_aspect: bool = False

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
        slots = checks.whole_number(
            "prefix_tokens", self.prefix_tokens, 0, 2**15 - 2, "a class token and 4 registers are 5"
        )
        object.__setattr__(self, "prefix_tokens", slots)
        if self.dim % self.heads:
            expected = f"a multiple of {self.heads} (heads)"
            raise ValueError(checks.sentence("dim", self.dim, expected, "change dim or heads"))
        checks.choice("position", self.position, POSITIONS, "choose a position embedding")
        checks.choice("pooling", self.pooling, POOLINGS, "choose a pooling")
        checks.choice("head", self.head, HEADS, "choose a head")
        if self.target_stride is not None:
            self._check_stride()
        checks.choice("attention", self.attention, ("auto", *BACKENDS), "choose a backend")
        checks.choice("activation", self.activation, ACTIVATIONS, "choose an activation")
        checks.choice("resize", self.resize, RESIZES, "choose an interpolation")
        for name in _FLAGS:
            object.__setattr__(self, name, checks.boolean(name, getattr(self, name)))
        for name in ("norm_eps",) if self.layer_scale is None else ("norm_eps", "layer_scale"):
            positive = checks.positive_number(name, getattr(self, name), "1e-6 is usual")
            object.__setattr__(self, name, float(positive))
        if self.norm_pooled and self.pooling in ("attention", "none"):
            expected = f"False with pooling={self.pooling!r}"
            remedy = "choose pooling='mean', 'max' or 'first'"
            raise ValueError(checks.sentence("norm_pooled", True, expected, remedy))
        # Channels are split in two for two axes, or for sin and cos, and in four for both.
        parts = {"sinusoidal": 4, "fourier": 2}.get(self.position.split("_")[0], 1)
        parts = 2 if self.position.endswith("stack") else parts
        if self.dim % parts:
            expected = f"a multiple of {parts} with position={self.position!r}"
            raise ValueError(checks.sentence("dim", self.dim, expected, "change dim or position"))
        # A head's channels turn in pairs, half of the pairs by y and half by x.
        if self.position in ROTARY and self.dim // self.heads % 4:
            found = self.dim // self.heads
            expected = f"a multiple of 4 with position={self.position!r}"
            raise ValueError(checks.sentence("dim ÷ heads", found, expected, "change dim or heads"))

    def _check_stride(self) -> None:
        remedy = "leave it out, or make the model with pooling='none' and num_classes"
        if self.pooling != "none" or self.num_classes is None or self.head != "linear":
            expected = "None, unless there are logits for each token"
            raise ValueError(checks.sentence("target_stride", self.target_stride, expected, remedy))
        stride = checks.whole_number(
            "target_stride", self.target_stride, 1, self.patch_size, "pass that of the rows"
        )
        if self.patch_size % stride:
            expected, remedy = f"a divisor of {self.patch_size} (patch_size)", "pass that of pack"
            raise ValueError(checks.sentence("target_stride", stride, expected, remedy))
        object.__setattr__(self, "target_stride", stride)

    @property
    def cells(self) -> int:
        """Cells of a token that have logits of their own."""
        stride = self.patch_size if self.target_stride is None else self.target_stride
        return (self.patch_size // stride) ** 2

    @classmethod
    def preset(cls, name: str, **options: Any) -> NaViTConfig:
        """Return a named shape: ``preset("B/16", num_classes=1000)``.

        Args:
            name: "Ti", "S", "B", "L" or "So400m", a slash and the patch size. Or the name of an
                encoder: of SigLIP or SigLIP 2, such as "siglip2-base-patch16-naflex" or
                "siglip-so400m-patch14-384"; "dinov2-base" (small, large),
                "dinov2-with-registers-base", "dinov3-vitb16" (s, l), "vit-base-patch16-224",
                "clip-vit-base-patch32" (16, or large 14), or of timm, such as
                "naflexvit_base_patch16_gap": its shape, with weights that are to be trained;
                `packpipe.from_pretrained` has the trained ones.
            **options: other attributes; patch_size, dim, depth, heads and mlp_dim are the name's,
                of an encoder also the switches, which may be given otherwise.

        >>> NaViTConfig.preset("S/14", num_classes=10).dim
        384
        """
        sizes, switches = preset_of(name)
        return cls(**sizes, **switches | options)

    @classmethod
    def from_dict(cls, options: dict[str, Any], source: object) -> NaViTConfig:
        """Return the configuration that was written as a dict, by this packpipe or an earlier one.

        Args:
            options: by name; those that came later are left out, and have their defaults.
            source: where they were read, for errors.

        Raises:
            ValueError: an option is unknown here.
        """
        checks.known_options(options, [field.name for field in fields(cls)], source)
        return cls(**options)

    @property
    def mlp_width(self) -> int:
        """Width of the MLPs."""
        return 4 * self.dim if self.mlp_dim is None else self.mlp_dim

    @property
    def side(self) -> int:
        """Places an axis of the position table."""
        return default_side(self.position) if self.max_side is None else self.max_side
