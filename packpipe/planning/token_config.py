"""`TokenConfig`: every option that decides a packed row of tokens, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from packpipe import checks
from packpipe.planning.image_options import PLAN_STRATEGIES

OVERFLOWS = ("error", "split", "truncate", "drop")
LAYOUTS = ("fixed", "ragged")
MAX_TOKEN_SEQ_LEN = 2**24  # the longest pack that `pack_lengths` plans


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Everything that decides a packed row of tokens, in addition to the source and (seed, epoch).

    Attributes:
        seq_len: tokens a pack holds, 1..2**24.
        overflow: what is done with a sequence longer than a pack: ``"error"`` refuses it;
            ``"split"`` cuts it into pieces of seq_len tokens and a rest, which are packed like
            sequences (best-fit packing); ``"truncate"`` keeps its first seq_len tokens;
            ``"drop"`` lists it in the rejects.
        layout: ``"fixed"``: rows of exactly seq_len tokens, padding at the end, with segment and
            position ids; ``"ragged"``: rows of the tokens alone, for `to_trl`.
        pad_token_id: padding of input_ids; labels are padded with -100, other columns with 0.
        mask_first_label: labels hold -100 at the first token of every segment, which no earlier
            token predicts; without a column of labels they are a copy of input_ids. For models
            that shift labels themselves, as those of transformers do.
        max_segments: most sequences or pieces a pack may hold; None for no limit.
        strategy: packing rule, any of `pack_lengths` but "optimal" and "nnlshp".
        window: most pieces planned together, in seeded order; a larger one pads less.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is out of range; ``name is VALUE, expected REQUIREMENT; remedy``.

    Source: Ding (best-fit packing).
    """

    seq_len: int = 1024
    overflow: str = "error"
    layout: str = "fixed"
    pad_token_id: int = 0
    mask_first_label: bool = False
    max_segments: int | None = None
    strategy: str = "bfd"
    window: int = 2**20

    def __post_init__(self) -> None:
        limits = {
            "seq_len": (1, MAX_TOKEN_SEQ_LEN, "choose a shorter row"),
            "window": (1, 2**62, "1024 or more keeps padding low"),
            "pad_token_id": (-(2**63), 2**63 - 1, "0 is usual"),
        }
        if self.max_segments is not None:
            limits["max_segments"] = (1, 2**31 - 1, "None is no limit")
        for name, (low, high, remedy) in limits.items():
            number = checks.whole_number(name, getattr(self, name), low, high, remedy)
            object.__setattr__(self, name, number)
        checks.choice("overflow", self.overflow, OVERFLOWS, "choose what too long ones become")
        checks.choice("layout", self.layout, LAYOUTS, "choose how rows are stored")
        checks.choice("strategy", self.strategy, PLAN_STRATEGIES, "choose a packing rule")
        masked = checks.boolean("mask_first_label", self.mask_first_label)
        object.__setattr__(self, "mask_first_label", masked)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return asdict(self)


def token_config_from(seq_len: int, options: dict[str, Any]) -> TokenConfig:
    """Return the configuration of seq_len and keyword options; an unknown one is refused."""
    known = [field.name for field in fields(TokenConfig)]
    for name in options:
        if name not in known:
            expected = "one of " + ", ".join(known) + ", for token columns"
            raise TypeError(checks.sentence("option", name, expected, "check its spelling"))
    return TokenConfig(seq_len=seq_len, **options)
