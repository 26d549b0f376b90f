"""Small real files in every format packpipe opens, and in some it does not, to be damaged.

Those of Pillow's encoders, and, for what these cannot write (interlacing, tiles, planes, run
lengths), files built from their own parts. The same in every run on the same version of Pillow.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

import packpipe

SIZE = (37, 26)
_PHOTOS = Path(packpipe.__file__).parent / "data" / "images"
_LARGEST = 6000  # bytes of the bundled files taken as they are
_MODES_16 = ("I;16", "I;16B", "I")
_LOSSLESS = {"lossless": True, "exact": True}
_ANIMATED = {"save_all": True, "duration": 40, "loop": 0}
_OLD_ICONS = {"bitmap_format": "bmp", "sizes": [(16, 16), (24, 24)]}
_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")

# What Pillow writes: format, modes, options of each file.
_WRITTEN: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("JPEG", "RGB", [{"subsampling": 0}, {"subsampling": 1}, {"progressive": True}]),
    ("JPEG", "RGB", [{"restart_marker_blocks": 1}, {"optimize": True}, {"keep_rgb": True}]),
    ("JPEG", "RGB L CMYK", [{"quality": 60}, {"progressive": True, "comment": b"none"}]),
    ("PNG", "RGB RGBA L LA P 1 I;16", [{}]),
    ("PNG", "RGB P", [{"transparency": 3, "dpi": (72, 72)}, _ANIMATED]),
    ("PNG", "RGBA", [_ANIMATED | {"default_image": True, "blend": 1, "disposal": 1}]),
    (
        "WEBP",
        "RGB RGBA",
        [{"quality": 60}, _LOSSLESS, _ANIMATED, _ANIMATED | {"allow_mixed": True}],
    ),
    ("WEBP", "RGBA", [{"alpha_quality": 10, "method": 6}, _ANIMATED | _LOSSLESS]),
    ("GIF", "RGB P L 1", [{}, {"interlace": 0, "transparency": 3}]),
    ("GIF", "RGB P", [_ANIMATED | {"disposal": disposal} for disposal in (1, 2, 3)]),
    ("TIFF", "RGB", [{"compression": name} for name in _COMPRESSIONS]),
    ("TIFF", "L RGBA", [{"compression": name} for name in _COMPRESSIONS[:4]]),
    ("TIFF", "1", [{"compression": name} for name in ("raw", "group3", "group4", "tiff_ccitt")]),
    ("TIFF", "P LA CMYK LAB YCbCr I;16 I;16B I F", [{}, {"compression": "tiff_lzw"}]),
    ("TIFF", "RGB L", [{"compression": "tiff_lzw", "tiffinfo": {317: 2}}, {"strip_size": 200}]),
    ("TIFF", "RGB", [{"big_tiff": True}, _ANIMATED, {"tiffinfo": {274: 6, 270: "words"}}]),
    ("BMP", "RGB RGBA L P 1", [{}]),
    ("DIB", "RGB P", [{}]),
    ("ICO", "RGBA RGB P", [{}, _OLD_ICONS]),
    ("PPM", "RGB L 1 I I;16", [{}]),
    ("TGA", "RGB RGBA L LA P", [{}, {"compression": "tga_rle"}]),
    ("TGA", "RGB 1", [{"orientation": 1}]),
    ("AVIF", "RGB RGBA L", [{"speed": 10, "quality": 40}]),
    ("AVIF", "RGB", [{"subsampling": "4:4:4", "speed": 10}, _ANIMATED | {"speed": 10}]),
    ("JPEG2000", "RGB RGBA L LA I;16", [{"irreversible": False}]),
    ("JPEG2000", "RGB", [{"no_jp2": True}, {"tile_size": (16, 16)}, {"irreversible": True}]),
    ("JPEG2000", "RGB", [{"quality_layers": [20, 5], "progression": "RPCL", "mct": 1}]),
    ("DDS", "RGB RGBA L LA", [{}]),
    ("DDS", "RGBA", [{"pixel_format": name} for name in ("DXT1", "DXT3", "DXT5", "BC3")]),
    ("DDS", "RGB", [{"pixel_format": "BC5"}]),
    ("PCX", "RGB L P 1", [{}]),
    ("SGI", "RGB RGBA L", [{}, {"bpc": 2}]),
    ("QOI", "RGB RGBA", [{}]),
    ("MPO", "RGB", [{"save_all": True}]),
    # Not opened by packpipe: they are rejected, whatever stands in them.
    *[(name, "RGB", [{}]) for name in ("EPS", "IM", "PDF")],
    *[(name, "1", [{}]) for name in ("MSP", "XBM")],
]


def seeds() -> dict[str, bytes]:
    """Return the files by name; a name's first word is the format."""
    found = {}
    for path in sorted(_PHOTOS.rglob("*")):
        if path.suffix in (".png", ".jpg") and path.stat().st_size <= _LARGEST:
            found[f"{Image.open(path).format} {path.name}"] = path.read_bytes()
    photo = Image.open(next(iter(sorted(_PHOTOS.rglob("*.jpg"))))).convert("RGB").resize(SIZE)
    for name, modes, options in _WRITTEN:
        for mode, option in product(modes.split(), options):
            found[f"{name} {mode} {option}"] = _written(_of_mode(photo, mode), name, option)
    found |= _described(photo) | _built_png() | _built_tiff() | _built_others(photo)
    found |= _of_extras(photo)
    found["CUR"] = b"\0\0\2\0" + found[f"ICO RGB {_OLD_ICONS}"][4:]
    return found


def _of_extras(photo: Image.Image) -> dict[str, bytes]:
    """HEIC and JPEG XL, where their plugins are installed, and a few of unknown range."""
    found = heic_floods()
    with suppress(ModuleNotFoundError):
        import pillow_heif

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        exif = Image.Exif()
        exif[0x0112] = 6
        described = {"exif": exif.tobytes(), "icc_profile": profile, "thumbnails": [16]}
        for name, mode, options in (
            *(
                ("", "RGB", {}),
                ("", "RGBA", {}),
                ("", "L", {}),
                ("tiles", "RGB", {"tile_size": 64}),
            ),
            ("exact", "RGB", {"quality": -1, "chroma": 444, "matrix_coefficients": 0}),
            ("described", "RGB", {}),
            ("several", "RGB", {"primary_index": 1}),
            ("PQ", "RGB", {"color_primaries": 9, "transfer_characteristics": 16}),
        ):
            # Smaller tiles are cut from larger ones, which leaves holes once that is damaged.
            size = (100, 70) if name == "tiles" else SIZE
            file, output = pillow_heif.from_pillow(photo.convert(mode).resize(size)), BytesIO()
            if name == "described":
                file.info.update(described)
            if name == "several":
                file.add_from_pillow(photo.rotate(90, expand=True))
            file.save(output, **options)
            found[f"HEIC {mode} {name}"] = output.getvalue()
    with suppress(ModuleNotFoundError):
        import pillow_jxl  # noqa: F401

        for mode, option in product(
            ("RGB", "RGBA", "L", "LA", "I;16", "F"),
            ({"lossless": True}, {"quality": 70}, {"quality": 70, "use_container": True}),
        ):
            found[f"JXL {mode} {option}"] = _written(_of_mode(photo, mode), "JXL", option)
    for mode, name in (("F", "PPM"), ("F", "TIFF"), ("I", "TIFF")):
        found[f"{name} of range {mode}"] = _written(photo.convert(mode), name, {})
    return found


def heic_of_boxes(*children: bytes, after: bytes = b"") -> bytes:
    """A HEIC file of no image, its items described by some boxes."""
    start = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
    return start + box(b"meta", bytes(4), *children) + after


def box(name: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), name) + b"".join(content)


def heic_floods(parts: int = 2**16 - 1) -> dict[str, bytes]:
    """HEIC files whose headers say again and again that much follows."""
    one = struct.pack(">IHHHHH", 0, 0x0100, 1, 1, 0, parts)  # an item, each part of a byte of size
    items = struct.pack(">IHH", 0, 0x0100, 40)
    items += (struct.pack(">HHH", 1, 0, parts // 40) + bytes(parts // 40)) * 40
    rest = box(b"free", bytes(parts))
    return {
        "HEIC places beyond their box": heic_of_boxes(box(b"iloc", one), rest),
        "HEIC many places": heic_of_boxes(box(b"iloc", one) * 40, rest),
        "HEIC many parts": heic_of_boxes(box(b"iloc", items)),
        "HEIC many items": heic_of_boxes(
            box(b"iloc", struct.pack(">IHH", 0, 0x0100, parts), bytes(6) * parts)
        ),
        "HEIC many descriptions": heic_of_boxes(after=box(b"meta", bytes(parts)) * 3),
        "HEIC many boxes": heic_of_boxes(box(b"free") * 1000),
    }


def _of_mode(photo: Image.Image, mode: str) -> Image.Image:
    if mode in _MODES_16:
        values = np.asarray(photo.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(values)
        if mode == "I;16B":
            return Image.frombytes(mode, image.size, values.astype(">u2").tobytes())
        return image if mode == "I;16" else image.convert("I")
    if mode == "LAB":
        spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(photo, *spaces, outputMode="LAB")
    if mode.endswith("A"):
        layer = photo.copy()
        layer.putalpha(photo.convert("L"))
        return layer.convert(mode)
    return photo.convert(mode)


def _written(image: Image.Image, name: str, options: dict[str, Any]) -> bytes:
    options = dict(options)
    if options.get("save_all"):
        options["append_images"] = [image.transpose(Image.Transpose.ROTATE_180)] * 2
    if options.get("transparency") and image.mode == "RGB" and name == "PNG":
        options["transparency"] = image.getpixel((0, 0))
    file = BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def _described(photo: Image.Image) -> dict[str, bytes]:
    """EXIF of every orientation, XMP, profiles and texts."""
    found = {}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x0110], exif[0x011A] = orientation, "camera", 72.0
        exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
        for name in ("JPEG", "PNG", "WEBP", "AVIF"):
            options = {"exif": exif.tobytes(), **({"speed": 10} if name == "AVIF" else {})}
            found[f"{name} orientation {orientation}"] = _written(photo, name, options)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for name in ("JPEG", "WEBP", "AVIF", "PNG", "TIFF", "JPEG2000", "GIF"):
        found[f"{name} described"] = _written(photo, name, {"xmp": xmp, "icc_profile": profile})
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "compressed " * 20, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    texts.add_text("Raw profile type exif", "\nexif\n 34\n" + exif.tobytes().hex())
    found["PNG texts"] = _written(photo, "PNG", {"pnginfo": texts})
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return the PNG file of some chunks, its lengths and checksums right."""
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _built_png() -> dict[str, bytes]:
    """All depths and colour types, interlaced and not, with every row filter."""
    rng, (width, height), found = np.random.default_rng(0), SIZE, {}
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    every = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    passes = {0: [(0, 0, 1, 1)], 1: [*every, (0, 1, 1, 2)]}
    for colour, interlaced in product(depths, passes):
        for depth in depths[colour]:
            rows = []
            for left, top, across, down in passes[interlaced]:
                bits = -((left - width) // across) * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
                for row in range(-((top - height) // down)):
                    rows.append(bytes([row % 5]) + rng.bytes(-(-bits // 8)))
            shape = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
            chunks = [(b"IHDR", shape), (b"gAMA", bytes([0, 0, 177, 143]))]
            if colour == 3:
                chunks += [(b"PLTE", rng.bytes(3 << depth)), (b"tRNS", rng.bytes(1 << depth))]
            elif colour in (0, 2) and interlaced:
                chunks.append((b"tRNS", bytes(2 if colour == 0 else 6)))
            chunks += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
            found[f"PNG built {colour} {depth} {interlaced}"] = png_of(chunks)
    return found


def _built_tiff() -> dict[str, bytes]:
    """Tiles and planes, plain and deflated, of 8 and 16 bits, in both byte orders."""
    found = {}
    for order, tiled, planes, bits, code in product("<>", (0, 1), (1, 3), (8, 16), (1, 8)):
        samples = np.random.default_rng(0).bytes(32 * 32 * 3 * bits // 8 // planes)
        data = samples if code == 1 else zlib.compress(samples)
        tags = {256: 32, 257: 32, 258: [bits] * 3, 259: code, 262: 2, 277: 3}
        places, lengths = (324, 325) if tiled else (273, 279)
        tags |= {322: 32, 323: 32} if tiled else {278: 32}
        tags |= {places: [0] * planes, lengths: [len(data)] * planes, 284: 2 if planes == 3 else 1}
        entries, more = [], 8 + 2 + 12 * len(tags) + 4
        first = more + sum(4 * len(value) for value in tags.values() if isinstance(value, list))
        blob = b""
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, list) else [value]
            if tag == places:
                values = [first + plane * len(data) for plane in range(planes)]
            packed = struct.pack(f"{order}{len(values)}I", *values)
            if len(values) > 1:
                blob, packed = blob + packed, struct.pack(order + "I", more + len(blob))
            entries.append(struct.pack(order + "HHI", tag, 4, len(values)) + packed)
        head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
        name = f"TIFF built {order} {tiled} {planes} {bits} {code}"
        blob = blob.ljust(first - more, b"\0")
        found[name] = head + b"".join(entries) + bytes(4) + blob + data * planes
    return found


def _built_others(photo: Image.Image) -> dict[str, bytes]:
    """Run lengths in SGI, BMP and PSD; PPM in words; several PCX."""
    width, height = SIZE
    planes = [np.asarray(band) for band in photo.split()]
    runs = b"".join(
        bytes([0x80 | width]) + row.tobytes() + b"\0" for plane in planes for row in plane[::-1]
    )
    starts = [512 + 8 * 3 * height + row * (width + 2) for row in range(3 * height)]
    table = struct.pack(f">{6 * height}I", *starts, *[width + 2] * (3 * height))
    sgi = struct.pack(">hBBHHHHii", 474, 1, 1, 3, width, height, 3, 0, 255).ljust(512, b"\0")
    grey = np.asarray(photo.convert("L"))
    lines = b"".join(b"\5\7\0\x20" + row[5:].tobytes() + b"\0\0" for row in grey[::-1]) + b"\0\1"
    sizes = (54 + 1024 + len(lines), 0, 54 + 1024, 40, width, height, 1, 8, 1, len(lines))
    bmp = struct.pack("<2sIIIIiiHHIIiiII", b"BM", *sizes, 0, 0, 256, 0)
    found = {
        "SGI built": sgi + table + runs,
        "BMP built": bmp + bytes(range(256)) * 4 + lines,
        "PPM words": b"P3 # some\n8 2 255\n" + b"1 22 255 " * 16,
        "PPM grey words": b"P2\n8 2 99\n" + b"1 22 " * 8,
        "PPM bits": b"P1\n8 2\n" + b"1 0 " * 8,
        "PPM float": b"Pf\n4 2\n-1.0\n" + struct.pack("<8f", *range(8)),
        "DCX built": struct.pack("<3I", 0x3ADE68B1, 12, 0) + _written(photo, "PCX", {}),
    }
    icons = {b"ic11": _written(photo.convert("RGBA").resize((32, 32)), "PNG", {})}
    icons[b"is32"] = (b"\x7f" + bytes(range(128)) + b"\xfd\x20") * 3
    icons[b"s8mk"] = bytes(range(256))
    for chosen in (["ic11"], ["is32", "s8mk"], ["ic11", "is32"]):
        blocks = [(name.encode(), icons[name.encode()]) for name in chosen]
        body = b"".join(name + struct.pack(">I", len(data) + 8) + data for name, data in blocks)
        found[f"ICNS built {' '.join(chosen)}"] = b"icns" + struct.pack(">I", len(body) + 8) + body
    for mode, packed in product("LRC", (False, True)):
        channels, code = {"L": (1, 1), "R": (3, 3), "C": (4, 4)}[mode]
        rows = [bytes([width - 1]) + grey[row].tobytes() for row in range(height)] * channels
        counts = struct.pack(f">{len(rows)}H", *map(len, rows))
        body = counts + b"".join(rows) if packed else grey.tobytes() * channels
        head = struct.pack(">4sH6xHIIHHIII", b"8BPS", 1, channels, height, width, 8, code, 0, 0, 0)
        found[f"PSD built {mode} {packed}"] = head + struct.pack(">H", packed) + body
    return found
