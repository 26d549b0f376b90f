"""`Explanation`: what a plan decided about one example, in numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass

from packpipe.planning.image_config import PackConfig


@dataclass(frozen=True)
class Explanation:
    """What a plan decided about one example; ``print`` it.

    Attributes:
        example: its row in the source.
        pack, segment: where it is; segments count from 0.
        image_hw: upright source size in pixels.
        box: (top, left, height, width) in pixels that it was cropped to, or None.
        drawn: the side, area or budget drawn for it, or None.
        drop_rate: the drop rate drawn for it, or None.
        shrunk: whether it was shrunk, having more tokens than allowed.
        decided_grid_hw, decided_num_keep: patch grid and kept tokens that follow from these.
        grid_hw, num_keep: those in the plan; larger if the image grew to fill its pack.
        config: the options.
        view: which of the example's views.
    """

    example: int
    pack: int
    segment: int
    image_hw: tuple[int, ...]
    box: tuple[int, ...] | None
    drawn: float | None
    drop_rate: float | None
    shrunk: bool
    decided_grid_hw: tuple[int, ...]
    decided_num_keep: int
    grid_hw: tuple[int, ...]
    num_keep: int
    config: PackConfig
    view: int = 0

    @property
    def fitted(self) -> bool:
        """Whether it grew to fill its pack."""
        decided = self.decided_grid_hw, self.decided_num_keep
        return decided != (self.grid_hw, self.num_keep)

    def __str__(self) -> str:
        (height, width), (rows, columns) = self.image_hw, self.decided_grid_hw
        law = self.config.law_of(self.view).resolution
        why = str(law) if self.drawn is None else f"{law} drew {self.drawn:.6g}"
        tokens = rows * columns
        view = f", view {self.view}" if self.config.num_views > 1 else ""
        lines = [
            f"example {self.example}{view}: pack {self.pack}, segment {self.segment}",
            f"  size    {height} x {width} pixels",
        ]
        if self.box is not None:
            top, left, *size = self.box
            what = f"{size[0]} x {size[1]} pixels at ({top}, {left})"
            lines.append(f"  crop    {what} ({self.config.law_of(self.view).crop})")
        lines.append(f"  grid    {rows} x {columns} patches of {self.config.patch_size} ({why})")
        # Shrinking may follow the law or the dropping; either way the grid above is the final one.
        if self.shrunk:
            lines[-1] += ", shrunk to fit"
        if self.drop_rate is not None:
            rate = f"rate {self.drop_rate:.4f} by {self.config.drop_rate}"
            lines.append(f"  keeps   {self.decided_num_keep} of {tokens} tokens ({rate})")
        if self.fitted:
            # Growing comes after packing, so this line is the last and overrides those above.
            (rows, columns), keep = self.grid_hw, self.num_keep
            what = f"{rows} x {columns} patches, keeps {keep} of {rows * columns} tokens"
            lines.append(f"  fitted  {what} (fit_last={self.config.fit_last!r})")
        return "\n".join(lines)
