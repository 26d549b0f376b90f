"""Images flow into rows: the animation at the top of the README, of bundled images.

    python docs/flow.py        # docs/pages/flow.gif

The images of a row lie above; their patches fly to their tokens, in reading order, 64 a line. What
stays hatched is padding. Sizes are drawn, and `pack` decides which images share a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import packpipe
from packpipe.images.patches import unpatchify
from packpipe.rows.picture import TOKENS_A_LINE, colours, row_picture
from packpipe.rows.rows import Rows
from packpipe.samples import images_folder

SEQ_LEN, NUM_ROWS = 256, 3
CELL, GAP, ABOVE = 10, 14, 150  # pixels: of a patch, between things, of the images
FLIGHT, PAUSE = 12, 40  # frames: of an image, at the end
MILLISECONDS, COLOURS = 70, 200

Picture = NDArray[np.uint8]


def main() -> None:
    """Pack the bundled images at drawn sizes, and write some rows as they fill."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        images = datasets.load_dataset(
            "imagefolder", data_dir=str(images_folder()), split="train", cache_dir=folder
        ).class_encode_column("label")
        sizes = packpipe.Side(packpipe.Uniform(48, 176))
        packed = packpipe.pack(images, SEQ_LEN, output=f"{folder}/packed", resolution=sizes)
        rows = packpipe.read_rows(packed)
        # From full ones to one that the last images are in.
        fullest = np.argsort(-(rows.segment_ids > 0).sum(axis=1), kind="stable")
        fitting = [int(row) for row in fullest if 3 < rows.num_segments[row] < 7]
        fitting = [row for row in fitting if across(rows, row)[-1] <= TOKENS_A_LINE * CELL]
        chosen = fitting[:: len(fitting) // NUM_ROWS][:NUM_ROWS]
        frames = list(flow(packpipe.read_rows(packed, chosen)))
    # One palette, of frames that show most: what does not move costs nothing.
    whole = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]]))
    palette = whole.quantize(COLOURS)
    first, *rest = [indexed(frame, palette) for frame in frames]
    path = Path(__file__).parent / "pages" / "flow.gif"
    shown = [MILLISECONDS] * len(rest) + [MILLISECONDS * PAUSE]
    first.save(path, save_all=True, append_images=rest, duration=shown, loop=0)


def indexed(frame: Picture, palette: Image.Image) -> Image.Image:
    """Return a frame in the colours of a palette, and white, which Pillow takes for grey."""
    picture = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
    numbers = np.where((frame == 255).all(axis=2), COLOURS, np.asarray(picture)).astype(np.uint8)
    found = Image.fromarray(numbers).convert("P")
    found.putpalette([*palette.getpalette()[: 3 * COLOURS], 255, 255, 255])
    return found


def across(rows: Rows, row: int) -> NDArray[np.int64]:
    """Return where a row's images begin, in pixels from the left, and where the last ends."""
    widths = CELL * rows.grid_hw[rows.offsets[row] : rows.offsets[row + 1], 1].astype(np.int64)
    begins = np.concatenate([[0], np.cumsum(widths + GAP)])
    return np.append(begins[:-1], begins[-1] - GAP)


def flow(rows: Rows) -> Iterator[Picture]:
    """Yield pictures of rows that fill, image by image."""
    lines = SEQ_LEN // TOKENS_A_LINE
    empty = row_picture(np.zeros((SEQ_LEN, CELL * CELL * 3), np.uint8), np.zeros(SEQ_LEN, np.int32))
    tops = [ABOVE + GAP + row * (lines * CELL + GAP) for row in range(len(rows))]
    canvas = np.full(
        (tops[-1] + lines * CELL + GAP, TOKENS_A_LINE * CELL + 2 * GAP, 3), 255, np.uint8
    )
    for top in tops:
        paste(canvas, empty, top, GAP)
    for row, top in enumerate(tops):
        small = np.stack([shrunk(patch) for patch in rows.patches[row]])
        filled = row_picture(small.reshape(SEQ_LEN, -1), rows.segment_ids[row])
        starts = across(rows, row)
        tint = np.rint(255 * colours(int(rows.num_segments[row]))).astype(np.uint8)
        for segment in range(int(rows.num_segments[row])):
            own = np.flatnonzero(rows.segment_ids[row] == segment + 1)
            coords = rows.coords[row].astype(np.int64)  # [seq_len, 2], (y, x) in patches
            for frame in range(FLIGHT + 1):
                shown = canvas.copy()
                for later in range(segment + 1, int(rows.num_segments[row])):
                    lies = rows.segment_ids[row] == later + 1
                    draw_image(shown, small[lies], coords[lies], starts[later], tint[later])
                for order, token in enumerate(own):
                    line, column = divmod(int(token), TOKENS_A_LINE)
                    there = np.array([top + line * CELL, GAP + column * CELL])
                    here = np.array([GAP, GAP + starts[segment]]) + CELL * coords[token]
                    begun = 0.6 * order / len(own)  # the first begins at 0, all end by 1
                    share = np.clip((frame / FLIGHT - begun) / 0.4, 0, 1)
                    y, x = np.rint(here + (there - here) * share**2 * (3 - 2 * share)).astype(int)
                    block = small[token]
                    if share == 1:
                        y0, x0 = line * CELL, column * CELL
                        block = filled[y0 : y0 + CELL, x0 : x0 + CELL]
                    paste(shown, block, y, x)
                yield shown
            for token in own:
                line, column = (CELL * place for place in divmod(int(token), TOKENS_A_LINE))
                block = filled[line : line + CELL, column : column + CELL]
                paste(canvas, block, top + line, GAP + column)


def draw_image(
    shown: Picture, patches: Picture, coords: NDArray[np.int64], left: int, colour: Picture
) -> None:
    """Draw an image that waits, framed in its colour."""
    height, width = coords.max(axis=0) + 1
    picture = unpatchify(
        patches.reshape(len(patches), -1), coords, (int(height), int(width))
    ).copy()
    picture[:2], picture[-2:], picture[:, :2], picture[:, -2:] = [colour] * 4
    paste(shown, picture, GAP, GAP + int(left))


def shrunk(patch: Picture) -> Picture:
    """Return a patch of 16 by 16 pixels as CELL by CELL."""
    return np.asarray(
        Image.fromarray(patch.reshape(16, 16, 3)).resize((CELL, CELL), Image.Resampling.BOX)
    )


def paste(onto: Picture, picture: Picture, top: int, left: int) -> None:
    """Put a picture onto another."""
    height, width = picture.shape[:2]
    onto[top : top + height, left : left + width] = picture


if __name__ == "__main__":
    main()
