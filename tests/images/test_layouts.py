"""Sample layouts that Pillow misreads: their pixels, or a reject that names them."""

from __future__ import annotations

import re
import struct
import zlib
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from strategies import encode
from test_decode import BACKGROUND, decoded

from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe

PILLOW = int(version("pillow").partition(".")[0])
HIGH, WIDE = 2, 3
RNG = np.random.default_rng(0)


def tiff(order, tags, parts):
    """A TIFF file of 32-bit tags; parts are its strips, tiles or planes."""
    places, lengths = (324, 325) if 322 in tags else (273, 279)
    tags = {256: WIDE, 257: HIGH, 278: HIGH, **tags}
    tags |= {places: [0] * len(parts), lengths: [len(part) for part in parts]}
    more = 8 + 2 + 12 * len(tags) + 4
    first = more + sum(4 * len(some) for some in tags.values() if np.size(some) > 1)
    starts = np.cumsum([first, *map(len, parts)])[:-1]
    entries, blob = [], b""
    for tag, value in sorted({**tags, places: starts}.items()):
        packed = struct.pack(f"{order}{np.size(value)}I", *np.ravel(value).tolist())
        if len(packed) > 4:
            blob, packed = blob + packed, struct.pack(order + "I", more + len(blob))
        entries.append(struct.pack(order + "HHI", tag, 4, np.size(value)) + packed)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    return head + b"".join(entries) + bytes(4) + blob + b"".join(parts)


def planes(photometric, samples, bits, order="<", *, extra=None, deflated=False, tiled=False):
    """A TIFF file of planes, and its samples: uint[height, width, samples]."""
    shape = (16, 16) if tiled else (HIGH, WIDE)
    values = RNG.integers(0, 1 << bits, (*shape, samples)).astype(f"{order}u{bits // 8}")
    parts = [values[..., plane].tobytes() for plane in range(samples)]
    tags = {258: [bits] * samples, 259: 8 if deflated else 1, 262: photometric, 277: samples}
    tags |= (
        {284: 2} | ({322: 16, 323: 16} if tiled else {}) | ({} if extra is None else {338: extra})
    )
    file = tiff(order, tags, [zlib.compress(part) if deflated else part for part in parts])
    return file, values[:HIGH, :WIDE].astype(int)


def shown(colours, alpha):
    """Pixels of 8 bits laid on the background."""
    alpha = alpha[..., None] / 255
    return colours * alpha + np.array(BACKGROUND) * (1 - alpha)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_tiff_of_planes_of_16_bits_gives_the_upper_8(order, tiled, deflated, alpha):
    kind = {"extra": 2} if alpha else {}
    file, values = planes(2, 3 + alpha, 16, order, deflated=deflated, tiled=tiled, **kind)
    levels = values >> 8
    assert len(np.unique(levels)) > 10
    wanted = shown(levels[..., :3], levels[..., 3]) if alpha else levels
    assert np.abs(decoded(file, (HIGH, WIDE)) - wanted).max() <= 1 * alpha


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1, 3])
def test_a_tiff_of_one_plane_is_one_of_samples_side_by_side(bits, order, photometric):
    part = bytes(RNG.integers(0, 256, HIGH * -(-WIDE * bits // 8), np.uint8))
    tags = {258: bits, 259: 1, 262: photometric, 277: 1}
    if photometric == 3:
        tags[320] = RNG.integers(0, 65536, 3 << bits)
    plain, plane = (tiff(order, {**tags, 284: planar}, [part]) for planar in (1, 2))
    wanted = np.asarray(Image.open(BytesIO(plain)).convert("RGB"))
    assert (decoded(plane, (HIGH, WIDE)) == wanted).all()


def test_a_tiff_of_one_plane_of_16_bits_is_scaled_by_its_depth():
    for order in "<>":
        file, values = planes(1, 1, 16, order)
        assert np.abs(decoded(file, (HIGH, WIDE)) - values / 257).max() <= 0.5


# What stands in the file: (photometric, samples, bits, options), and the mode Pillow gives it.
LOST = {
    "grey and alpha": (1, 2, 8, {"extra": 2}, "LA"),
    "grey and alpha, deflated": (1, 2, 8, {"extra": 2, "deflated": True}, "LA"),
    "grey and alpha, multiplied": (1, 2, 8, {"extra": 1, "deflated": True}, "La"),
    "LAB": (8, 3, 8, {}, "LAB"),
    "LAB, deflated": (8, 3, 8, {"deflated": True}, "LAB"),
    "CMYK of 16 bits": (5, 4, 16, {}, "CMYK"),
    "YCbCr": (6, 3, 8, {}, "YCbCr"),
    "alpha without a mark, deflated": (2, 4, 8, {"deflated": True}, "RGBA"),
    "alpha without a mark, of 16 bits": (2, 4, 16, {}, "RGBA"),
    "alpha without a mark, in tiles": (2, 4, 8, {"tiled": True}, "RGBA"),
    "RGB and alpha, multiplied": (2, 4, 8, {"extra": 1}, "RGBA"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_tiff_of_planes_that_pillow_mixes_up_is_refused_by_name(name):
    photometric, samples, bits, options, mode = LOST[name]
    file, _ = planes(photometric, samples, bits, **options)
    layout = f"a TIFF of {samples} samples of {bits} bits in planes (mode {mode})"
    if mode == "La" and PILLOW < 13:  # which does not open it
        layout = f"a TIFF of {samples} samples of {bits} bits in planes, unsigned, little-endian,"
    else:
        assert probe(file, max_pixels=1000).image_hw == (HIGH, WIDE)
    with pytest.raises(BadImage, match=f"^{re.escape(layout)} has no rule to become RGB$") as found:
        decoded(file, (HIGH, WIDE))
    assert found.value.reason == "unsupported mode"


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("photometric", "samples", "bits", "extra"),
    [(1, 2, 8, 0), (2, 4, 8, 0), (2, 5, 8, 0), (1, 2, 16, 2)],
)
def test_a_tiff_of_planes_that_pillow_cannot_open_is_refused_by_name(
    photometric, samples, bits, extra, tiled
):
    file, _ = planes(photometric, samples, bits, extra=extra, tiled=tiled)
    layout = f"a TIFF of {samples} samples of {bits} bits in planes, unsigned, little-endian"
    with pytest.raises(BadImage, match=f"^{layout}, has no rule to become RGB$") as found:
        probe(file, max_pixels=1000)
    assert found.value.reason == "unsupported mode"


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(("photometric", "samples", "kind"), [(2, 3, {}), (2, 4, {"extra": 2})])
def test_a_tiff_of_planes_of_8_bits_is_what_it_was(photometric, samples, kind, deflated):
    file, values = planes(photometric, samples, 8, deflated=deflated, **kind)
    wanted = values if samples == 3 else shown(values[..., :3], values[..., 3])
    assert np.abs(decoded(file, (HIGH, WIDE)) - wanted).max() <= (samples == 4)


def test_a_tiff_of_signed_bytes_is_refused_by_name():
    file = tiff("<", {258: 8, 259: 1, 262: 1, 277: 1, 339: 2}, [bytes(HIGH * WIDE)])
    message = "a TIFF of signed bytes has no rule to become RGB"
    with pytest.raises(BadImage, match=f"^{message}$"):
        decoded(file, (HIGH, WIDE))


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_ycbcr_is_that_whatever_follows_its_strips(order):
    tags = {258: [8] * 3, 259: 1, 262: 6, 277: 3, 278: 1, 530: [1, 1]}
    file = tiff(order, tags, [bytes([76, 85, 255] * WIDE)] * HIGH) + bytes(100)
    assert np.abs(decoded(file, (HIGH, WIDE)) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(("said", "places"), [({}, "2 x 2"), ({530: [2, 1]}, "2 x 1")])
def test_a_tiff_of_ycbcr_of_fewer_colours_is_refused_by_name(said, places):
    tags = {258: [8] * 3, 259: 1, 262: 6, 277: 3, **said}
    file = tiff("<", tags, [bytes(3 * HIGH * WIDE)])
    layout = f"a TIFF of YCbCr without compression, its colours in {places} pixels,"
    with pytest.raises(BadImage, match=f"^{layout} has no rule to become RGB$") as found:
        decoded(file, (HIGH, WIDE))
    assert found.value.reason == "unsupported mode"


@pytest.mark.parametrize("places", [[1], [2, 2], [1, 1, 1]])
def test_a_tiff_without_ycbcr_may_say_anything_of_its_colours(places):
    tags = {258: 8, 259: 1, 262: 1, 277: 1, 530: places}
    assert (decoded(tiff("<", tags, [bytes([7] * HIGH * WIDE)]), (HIGH, WIDE)) == 7).all()


@pytest.mark.parametrize("places", [[1], [1, 1, 1]])
def test_a_tiff_of_ycbcr_that_does_not_say_two_numbers_is_refused_by_name(places):
    tags = {258: [8] * 3, 259: 1, 262: 6, 277: 3, 530: places}
    file = tiff("<", tags, [bytes(3 * HIGH * WIDE)])
    layout = "a TIFF of YCbCr without compression, its colours in"
    message = f"^{layout} {len(places)} numbers of pixels, has no rule to become RGB$"
    with pytest.raises(BadImage, match=message) as found:
        decoded(file, (HIGH, WIDE))
    assert found.value.reason == "unsupported mode"


INDICES = RNG.integers(0, 2, (HIGH, WIDE))


def bitmap(bits, palette, indices=INDICES, *, old=False, run_lengths=False):
    """The header, palette and pixels of a BMP file; the header and its length in front of them."""
    stride = (WIDE * bits + 31) // 32 * 4
    rows = []
    for row in indices[::-1].tolist():
        places = "".join(f"{index:0{bits}b}" for index in row).ljust(stride * 8, "0")
        rows.append(int(places, 2).to_bytes(stride, "big"))
        if run_lengths:  # one pixel at a time
            packed = [index << 4 | index if bits == 4 else index for index in row]
            rows[-1] = b"".join(bytes([1, index]) for index in packed) + b"\0\0"
    colours = b"".join(bytes(colour[::-1]) + b"\0" * (not old) for colour in palette)
    if old:
        head = struct.pack("<IHHHH", 12, WIDE, HIGH, 1, bits)
    else:
        code = {8: 1, 4: 2}[bits] if run_lengths else 0
        head = struct.pack("<IiiHHIIiiII", 40, WIDE, HIGH, 1, bits, code, 0, 0, 0, len(palette), 0)
    return head + colours, b"".join(rows)


def bmp(*given, **options):
    head, pixels = bitmap(*given, **options)
    return b"BM" + struct.pack("<III", 0, 0, 14 + len(head)) + head + pixels


BLACK_WHITE = [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("run_lengths", [False, True])
@pytest.mark.parametrize("palette", [BLACK_WHITE, BLACK_WHITE[::-1], [(0, 0, 0), (9, 8, 7)]])
def test_a_bmp_of_two_colours_has_as_many_bits_as_it_says(bits, palette, run_lengths):
    if run_lengths and bits == 1:
        return
    file = bmp(bits, palette, run_lengths=run_lengths)
    wanted = np.array(palette)[INDICES]
    assert (decoded(file, (HIGH, WIDE)) == wanted).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("old", [False, True])
def test_a_bmp_whose_greys_are_their_own_numbers_has_as_many_bits_as_it_says(bits, old):
    indices = RNG.integers(0, 1 << bits, (HIGH, WIDE))
    file = bmp(bits, [(grey,) * 3 for grey in range(1 << bits)], indices, old=old)
    assert (decoded(file, (HIGH, WIDE)) == indices[..., None]).all()
    dib = file[14:]
    assert (decoded(dib, (HIGH, WIDE)) == indices[..., None]).all()


@pytest.mark.parametrize("kind", [1, 2], ids=["icon", "cursor"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_an_icon_of_two_colours_is_its_picture_or_refused_by_name(kind, bits):
    head, pixels = bitmap(bits, BLACK_WHITE)
    head = head[:8] + struct.pack("<i", 2 * HIGH) + head[12:]
    content = head + pixels + bytes(4 * HIGH)
    entry = struct.pack("<BBBBHHII", WIDE, HIGH, 2, 0, 1, bits, len(content), 22)
    file = struct.pack("<HHH", 0, kind, 1) + entry + content
    if bits == 1:
        wanted = np.array(BLACK_WHITE)[INDICES]
        assert (decoded(file, (HIGH, WIDE)) == wanted).all()
        return
    message = f"an icon of {bits} bits in two or grey colours has no rule to become RGB"
    with pytest.raises(BadImage, match=f"^{message}$"):
        decoded(file, (HIGH, WIDE))


def psd(mode, bits, channels, planes, layers=b"", *, packed=False):
    """A PSD file of some planes, bytes[height, width] or packed bits."""
    lines = [bytes(row) for plane in planes for row in plane]
    body = b"".join(lines)
    if packed:
        lines = [bytes([len(line) - 1]) + line for line in lines]
        body = struct.pack(f">{len(lines)}H", *map(len, lines)) + b"".join(lines)
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, HIGH, WIDE, bits, mode)
    resources = b"8BIM" + struct.pack(">HHI", 1000, 0, 4) + bytes(4)
    sections = struct.pack(">II", 0, len(resources)) + resources + struct.pack(">I", len(layers))
    return head + sections + layers + struct.pack(">H", packed) + body


@pytest.mark.parametrize("packed", [False, True])
def test_a_psd_of_bits_has_a_white_0(packed):
    bits = np.packbits(INDICES.astype(np.uint8), axis=1)
    found = decoded(psd(0, 1, 1, [bits], packed=packed), (HIGH, WIDE))
    assert (found == 255 * (1 - INDICES)[..., None]).all()


def layer_section(count, more=b""):
    """Layers are counted with a sign; Pillow passes over what is said about each."""
    info = struct.pack(">h", count) + bytes(2)
    return struct.pack(">I", len(info)) + info + bytes(4) + more


MERGED = b"8BIMMtrn" + bytes(4)
FOURTH = {
    "no layers": (b"", False),
    "a count without sign": (layer_section(1), False),
    "a count with its sign": (layer_section(-1), True),
    "a block that says so": (layer_section(0, MERGED), True),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FOURTH)
def test_the_fourth_channel_of_a_psd_is_transparency_where_the_layers_say_so(name, packed):
    layers, is_transparency = FOURTH[name]
    values = RNG.integers(0, 256, (4, HIGH, WIDE), np.uint8)
    found = decoded(psd(3, 8, 4, values, layers, packed=packed), (HIGH, WIDE))
    colours = values[:3].transpose(1, 2, 0)
    wanted = shown(colours, values[3]) if is_transparency else colours
    assert np.abs(found - wanted).max() <= 1 * is_transparency


def test_a_psd_of_inks_alone_is_refused_by_name():
    file = psd(7, 8, 2, np.zeros((2, HIGH, WIDE), np.uint8))
    with pytest.raises(BadImage, match=r"^a PSD in multichannel mode has no rule to become RGB$"):
        decoded(file, (HIGH, WIDE))


def test_a_picture_of_the_callers_that_is_not_loaded_is_mended_too():
    file, values = planes(2, 3, 16)
    with Image.open(BytesIO(file)) as image:
        assert (decoded(image, (HIGH, WIDE)) == values >> 8).all()
        assert (decoded(image, (HIGH, WIDE)) == values >> 8).all()  # loaded by now
    icon = encode(Image.new("RGB", (16, 16), (1, 2, 3)), "ICO")
    assert (decoded(icon, (16, 16)) == [1, 2, 3]).all()


def gif(canvas_hw, place, transparency=None):
    """A GIF file whose one frame lies at (left, top) of a larger canvas, and the frame's pixels."""
    palette = RNG.integers(0, 256, (4, 3), np.uint8)
    frame = Image.frombytes("P", (WIDE, HIGH), RNG.integers(0, 4, (HIGH, WIDE), np.uint8).tobytes())
    frame.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    file = encode(frame, "GIF", **options)
    at = file.index(b"\x2c\0\0\0\0") + 1
    start = file[:6] + struct.pack("<HH", *canvas_hw[::-1]) + file[10:at]
    pixels = np.asarray(Image.open(BytesIO(file)).convert("RGBA")).astype(int)
    return start + struct.pack("<HH", *place) + file[at + 4 :], pixels


@pytest.mark.parametrize("transparency", [None, 0, 2])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (1, 0)])
def test_a_gif_is_transparent_where_its_frame_does_not_cover_its_canvas(place, transparency):
    canvas_hw = (HIGH + 3, WIDE + 4)
    file, frame = gif(canvas_hw, place, transparency)
    wanted = np.broadcast_to(np.array(BACKGROUND, float), (*canvas_hw, 3)).copy()
    left, top = place
    wanted[top : top + HIGH, left : left + WIDE] = shown(frame[..., :3], frame[..., 3])
    assert probe(file, max_pixels=100).image_hw == canvas_hw
    assert (decoded(file, canvas_hw) == wanted).all()


def test_a_gif_whose_frame_covers_its_canvas_is_what_it_was():
    file, frame = gif((HIGH, WIDE), (0, 0))
    assert (decoded(file, (HIGH, WIDE)) == frame[..., :3]).all()
