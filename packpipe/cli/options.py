"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from packpipe import checks

Source = Annotated[
    str,
    typer.Argument(
        help="A folder of images (one folder a class; train, validation and test are splits where "
        "no other folders lie beside them) or a tar or zip of it, a CSV of paths and labels, a "
        "Parquet file or folder, what save_to_disk wrote, or a name that datasets.load_dataset "
        "knows."
    ),
]
Folder = Annotated[str, typer.Argument(help="What pack wrote; also a URL.")]
CacheBytes = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Most bytes of copies of packed rows in a store; what does not fit is read row by "
        "row.  \\[half of what the disk has for them]",
    ),
]
SeqLen = Annotated[int, typer.Option(help="Tokens a row.")]
PrefixTokens = Annotated[
    int | None,
    typer.Option(help="Slots before each image's patches, for class token and registers.  [0]"),
]
PatchSize = Annotated[int | None, typer.Option(help="Pixels a side of a patch.  [16]")]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--resolution", help="native: its own size. budget: the largest within --max-tokens."
    ),
]
Sides = Annotated[
    tuple[int, int] | None,
    typer.Option(help="Draw each image's size: the pixels of a square with a side between these."),
]
CropArea = Annotated[
    tuple[float, float] | None,
    typer.Option(help="Crop each image to a random box, of a share of its area between these."),
]
CropAspect = Annotated[
    tuple[float, float] | None,
    typer.Option(help="Of the box: factors on the image's width ÷ height.  [0.75 1.333]"),
]
CenterCropArea = Annotated[
    float | None,
    typer.Option("--center-crop", help="Crop each image to its middle, of this share of its area."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an image.")]
Views = Annotated[
    int | None, typer.Option(help="Segments of each image, each with draws of its own.  [1]")
]
ViewsTogether = Annotated[
    bool | None,
    typer.Option("--views-together", help="Keep the views of an image in one row."),
]
DropRate = Annotated[float | None, typer.Option(help="Share of an image's tokens that is dropped.")]
MaxSegments = Annotated[int | None, typer.Option(help="Most images or sequences a row.")]
Strategy = Annotated[str | None, typer.Option(help="Packing rule, such as ffd, bfd, balanced.")]
Overflow = Annotated[
    str | None,
    typer.Option(help="Of a sequence longer than a row: error, split, truncate, drop."),
]
Profiles = Annotated[
    str | None,
    typer.Option(
        help="srgb, unless given: colours become sRGB by their profiles. ignore: numbers as they "
        "are."
    ),
]
DamagedScans = Annotated[
    str | None,
    typer.Option(
        help="Of JPEGs: reject, unless given; strict, by a second decode, with simplejpeg; keep."
    ),
]
Pixels = Annotated[
    str | None,
    typer.Option(help="What decodes: pillow, unless given; turbo, faster, with packpipe\\[turbo]."),
]
ValueRange = Annotated[
    tuple[float, float] | None,
    typer.Option(help="Black and white of images in floating point or 32-bit integers."),
]
ImageColumn = Annotated[
    str, typer.Option(help="Name of the column of images, or of their paths; auto finds it.")
]
LabelColumn = Annotated[str, typer.Option(help="Name of the column of labels; auto finds it.")]
MaskColumn = Annotated[
    str | None,
    typer.Option(help="Name of the column of class maps, or of their paths, instead of labels."),
]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Epoch = Annotated[int, typer.Option(help="Which of the seed's orders and draws.")]
MaxBadFraction = Annotated[
    float, typer.Option(help="A larger share of examples that cannot be read stops it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def crop_of(
    area: tuple[float, float] | None,
    aspect: tuple[float, float] | None,
    middle: float | None = None,
) -> Any:
    """Return the crop that options ask for; None if they ask for none.

    Raises:
        ValueError: both a random box and the middle are asked for, or a number is out of range.
    """
    from packpipe import CenterCrop, Crop

    if middle is not None:
        if area is not None or aspect is not None:
            what = f"--center-crop is {middle}, expected none beside --crop-area and --crop-aspect"
            raise ValueError(f"{what}; pass one or the others")
        return CenterCrop(middle)
    bounds = given(area=None if area is None else between_given("--crop-area", area), aspect=aspect)
    return Crop(**bounds) if bounds else None


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; the others keep the defaults of `pack`."""
    # Options of images are refused for tokens and the reverse, so defaults may not be passed.
    return {name: value for name, value in options.items() if value is not None}


def resolution_of(name: str | None, sides: tuple[int, int] | None) -> Any:
    """Return the resolution that options ask for; None if they ask for none.

    Raises:
        ValueError: both a name and sides are given, or the first side is the larger one.
    """
    if sides is None:
        return name  # None if neither was given
    if name is not None:
        raise ValueError(f"--sides is {sides}, expected none beside --resolution; pass one of them")
    from packpipe import Side

    return Side(between_given("--sides", sides))


def between_given(option: str, bounds: tuple[float, float]) -> Any:
    """Return the distribution that draws between the two numbers of an option.

    Raises:
        ValueError: the first number is the larger one.
    """
    from packpipe.planning.distributions import between

    low, high = bounds
    if low > high:
        expected, remedy = "the smaller number first", f"pass {option} {high} {low}"
        raise ValueError(checks.sentence(option, bounds, expected, remedy))
    return between(low, high)
