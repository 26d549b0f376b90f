"""HEIC, and what both extra formats share. JPEG XL itself: see `test_jpegxl`."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
import sys
from importlib.metadata import version
from io import BytesIO

import naive_profiles
import numpy as np
import pictures
import pytest
from fuzz_seeds import heic_floods
from PIL import Image
from test_decode import BACKGROUND, decoded
from test_jpegxl import UPRIGHT, jxl, noise

import packpipe
from packpipe.images import bad_images, extras, jpegxl
from packpipe.images.bad_images import BadImage
from packpipe.images.decode import probe

pillow_heif = pytest.importorskip("pillow_heif")

HIGH, WIDE = 40, 64  # libx265 takes no less than 8 x 8, and pads
EXACT = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
MODES_16 = {"I;16": 1, "RGB;16": 3, "RGBA;16": 4}


def heic_of(file, **options):
    output = BytesIO()
    file.save(output, **{**EXACT, **options})
    return output.getvalue()


def heic(pixels, mode="RGB", **options):
    high, wide = pixels.shape[:2]
    return heic_of(pillow_heif.from_bytes(mode, (wide, high), pixels.tobytes()), **options)


def smooth(*channels, most=255, dtype=np.uint8):
    """Pixels that differ in every corner and every channel."""
    down, across = np.mgrid[0 : 1 : HIGH * 1j, 0 : 1 : WIDE * 1j]
    bands = [down * across, down, 1 - across, (down + across) / 2][: channels[0] if channels else 1]
    values = np.stack(bands, axis=-1).reshape(HIGH, WIDE, *channels)
    return np.rint(values * most).astype(dtype)


PIXELS = smooth(3)


@pytest.fixture(scope="module")
def plain():
    return heic(PIXELS)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.info["exif"] = exif.tobytes()
    return heic_of(file)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_heic_is_upright_by_its_own_properties(orientation):
    encoded = turned(orientation)
    assert (b"irot" in encoded or b"imir" in encoded) == (orientation > 1)
    expected = UPRIGHT[orientation](PIXELS)
    assert probe(encoded, max_pixels=10**6).image_hw == expected.shape[:2]
    assert (decoded(encoded, expected.shape[:2]) == expected).all()


def test_exif_of_heic_turns_nothing():
    encoded = turned(1)
    place = encoded.index(b"MM\0*", encoded.index(b"mdat")) + 18
    assert encoded[place : place + 2] == b"\0\1"
    encoded = encoded[:place] + b"\0\6" + encoded[place + 2 :]
    assert probe(encoded, max_pixels=10**6) == ((HIGH, WIDE), False)
    assert (decoded(encoded, (HIGH, WIDE)) == PIXELS).all()


@pytest.mark.parametrize("mode", MODES_16)
def test_more_than_8_bits_are_scaled_by_depth(mode):
    channels = MODES_16[mode]
    values = smooth(*([channels] if channels > 1 else []), most=1023, dtype=np.uint16) * 64
    encoded = heic(values, mode)
    file = pillow_heif.open_heif(encoded, convert_hdr_to_8bit=False)
    read = np.asarray(file).reshape(HIGH, WIDE, channels)
    assert (file.info["bit_depth"], read.dtype, read.max()) == (10, np.uint16, 1023 * 64)
    shares = read / (1023 * 64)
    expected = np.broadcast_to(shares[..., :3] * 255, (HIGH, WIDE, 3))
    if channels == 4:
        expected = expected * shares[..., 3:] + np.array(BACKGROUND) * (1 - shares[..., 3:])
    assert np.abs(decoded(encoded, (HIGH, WIDE)) - expected).max() <= (0.75 if channels == 1 else 2)


@pytest.mark.parametrize("premultiplied", [False, True])
def test_transparency_is_laid_on_the_background(premultiplied):
    values = smooth(4)
    alpha = values[..., 3:] / 255
    if premultiplied:
        values[..., :3] = values[..., :3] * alpha
    encoded = heic(values, "RGBa" if premultiplied else "RGBA")
    found = decoded(encoded, (HIGH, WIDE)).astype(float)
    above = values[..., :3] * (1 if premultiplied else alpha)
    assert np.abs(found - (above + np.array(BACKGROUND) * (1 - alpha))).max() <= 2


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_unless_profiles_are_ignored(transfer, name):
    coded = {"color_primaries": 9, "transfer_characteristics": transfer, "full_range_flag": 1}
    encoded = heic(smooth(3, most=1023, dtype=np.uint16) * 64, "RGB;16", **coded)
    image_hw = probe(encoded, max_pixels=10**6).image_hw
    with pytest.raises(BadImage, match=f"^the transfer is {name}, expected") as found:
        decoded(encoded, image_hw)
    assert found.value.reason == "high dynamic range"
    assert np.abs(decoded(encoded, image_hw, profiles="ignore").astype(int) - PIXELS).max() <= 1


def test_code_points_and_profiles_become_srgb():
    profile = naive_profiles.rgb_profile(naive_profiles.P3, 2.2)
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.info["icc_profile"] = profile
    expected = naive_profiles.srgb_by(PIXELS, profile)
    assert np.abs(expected - PIXELS).max() > 20
    assert np.abs(decoded(heic_of(file), (HIGH, WIDE)) - expected).max() <= 2
    coded = heic(PIXELS, color_primaries=12, transfer_characteristics=13, full_range_flag=1)
    expected = naive_profiles.srgb_of(PIXELS, naive_profiles.P3)
    assert np.abs(decoded(coded, (HIGH, WIDE)) - expected).max() <= 2


@pytest.mark.parametrize("primary", [0, 1])
def test_the_primary_image_is_the_one_that_counts(primary):
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.add_from_pillow(Image.fromarray(np.rot90(PIXELS)))
    encoded = heic_of(file, primary_index=primary)
    expected = [PIXELS, np.rot90(PIXELS)][primary]
    assert probe(encoded, max_pixels=10**6).image_hw == expected.shape[:2]
    assert (decoded(encoded, expected.shape[:2]) == expected).all()


def test_the_image_is_decoded_not_its_thumbnail():
    large = np.repeat(np.repeat(PIXELS, 4, axis=0), 4, axis=1)
    file = pillow_heif.from_pillow(Image.fromarray(large))
    file.info["thumbnails"] = [64]
    encoded, without = heic_of(file), heic(large)
    assert pillow_heif.open_heif(encoded).info["thumbnails"] == [64]
    hw, rules = large.shape[:2], {"reducing_gap": 1.0, "target_hw": (10, 16)}
    assert (decoded(encoded, hw, **rules) == decoded(without, hw, **rules)).all()


def test_heic_cut_anywhere_is_a_reject(plain):
    for cut in (*range(12, len(plain) - 1, 97), len(plain) - 1):
        with pytest.raises(BadImage) as found:
            decoded(plain[:cut], (HIGH, WIDE))
        assert found.value.reason in ("unreadable", "undecodable")


def test_a_heic_of_tiles_that_is_cut_is_a_reject():
    """The decoder gives these, with a hole of whatever stood in memory."""
    encoded = heic(PIXELS, tile_size=16)
    assert (decoded(encoded, (HIGH, WIDE)) == PIXELS).all()
    for left in (1, 10, 100, 400):
        cut = encoded[:-left]
        pillow_heif.open_heif(cut)[0].load()
        message = f"a HEIC file cut to {len(cut)} bytes of {len(encoded)}"
        with pytest.raises(BadImage, match=f"^{message}$") as found:
            probe(cut, max_pixels=10**6)
        assert found.value.reason == "unreadable"


def test_a_heic_that_reads_its_bytes_again_and_again_is_a_reject(monkeypatch):
    monkeypatch.setattr(extras, "_LEAST_EXTENTS", 10_000)
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0" + bytes(5000)
    encoded = heic_of(file)
    assert (decoded(encoded, (HIGH, WIDE)) == PIXELS).all()
    # Two items of one part each: where and how long, and now both of all bytes, many times.
    place = encoded.index(b"iloc")
    (size,) = struct.unpack_from(">I", encoded, place - 4)
    assert encoded[place + 4 : place + 12] == bytes([0, 0, 0, 0, 0x44, 0x40, 0, 2])
    parts = struct.pack(">HHIH", 1, 0, 0, 8) + struct.pack(">II", 0, len(encoded)) * 8
    iloc = encoded[place : place + 10] + struct.pack(">H", 1) + parts
    again = encoded[: place - 4] + struct.pack(">I", 4 + len(iloc)) + iloc
    meta = encoded.index(b"meta")
    again += encoded[place - 4 + size :]
    grown = struct.unpack_from(">I", encoded, meta - 4)[0] + 4 + len(iloc) - size
    again = again[: meta - 4] + struct.pack(">I", grown) + again[meta:]
    message = f"a HEIC file of {len(again)} bytes whose parts have {8 * len(encoded)}"
    with pytest.raises(BadImage, match=f"^{message}$"):
        probe(again, max_pixels=10**6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda b: b[:28] + (b"\0\0\0\x08free") * 70 + b[28:],
            "a HEIC file of more than 64 boxes",
        ),
        (
            lambda b: b[:28] + struct.pack(">I", 2**23 + 8) + b[32:] + bytes(2**23),
            f"a HEIC file with {2**23} bytes of properties",
        ),
        (
            lambda b: b.replace(b"iloc\0\0\0\0\x44", b"iloc\0\0\0\0\x40"),
            "a HEIC file whose items have no length",
        ),
    ],
)
def test_headers_that_no_photograph_has_are_refused(plain, damage, message):
    assert plain[32:36] == b"meta"
    with pytest.raises(BadImage, match=f"^{message}$") as found:
        probe(damage(plain), max_pixels=10**6)
    assert found.value.reason == "unreadable"


def with_size(encoded, width, height):
    place = encoded.index(b"ispe") + 8
    return encoded[:place] + struct.pack(">II", width, height) + encoded[place + 8 :]


POISON = r"^an image in the HEIC file has {}x{} pixels, expected at most 1000000"


@pytest.mark.parametrize("hw", [(2**31, 1), (1, 2**31), (2**16, 2**16), (2**32 - 1, 2**32 - 1)])
def test_a_poisonous_size_is_refused_by_the_header(plain, hw):
    with pytest.raises(BadImage, match=POISON.format(*hw)) as found:
        probe(with_size(plain, *hw[::-1]), max_pixels=10**6)
    assert found.value.reason == "too many pixels"


def test_a_size_of_nothing_is_refused_by_the_decoder(plain):
    with pytest.raises(BadImage, match=r"Zero image width or height$") as found:
        probe(with_size(plain, 2**32 - 1, 0), max_pixels=10**6)
    assert found.value.reason == "unreadable"


def test_a_larger_stream_than_its_header_says_is_refused_before_it_is_decoded():
    damaged = with_size(heic(np.zeros((512, 512), np.uint8), "L"), 64, 64)
    with pytest.raises(BadImage, match=r"^libheif cannot decode it$") as found:
        decoded(damaged, probe(damaged, max_pixels=10**6).image_hw)
    assert found.value.reason == "undecodable"
    said = str(found.value.__cause__.__cause__)
    assert "512x512 exceeds the maximum image size" in said


@pytest.mark.parametrize("hw", [(64, 72), (500, 500)])
def test_a_size_that_its_stream_does_not_have_is_undecodable(plain, hw):
    damaged = with_size(plain, *hw[::-1])
    with pytest.raises(BadImage, match=r"^libheif cannot decode it$") as found:
        decoded(damaged, probe(damaged, max_pixels=10**6).image_hw)
    assert found.value.reason == "undecodable"


def test_a_larger_image_beside_the_primary_one_is_named_as_such():
    file = pillow_heif.from_pillow(Image.fromarray(PIXELS))
    file.add_from_pillow(Image.new("L", (200, 100)))
    encoded = heic_of(file, primary_index=0)
    assert probe(encoded, max_pixels=20_000).image_hw == (HIGH, WIDE)
    message = "an image in the HEIC file has 100x200 pixels, expected at most 10000"
    with pytest.raises(BadImage, match=f"^{message}$"):
        probe(encoded, max_pixels=10_000)


FAILED = "Memory allocation error: Unspecified: Allocating 36000015 bytes failed"


def raising(error):
    def raises(*_):
        raise error

    return raises


@pytest.mark.parametrize("step", [probe, decoded])
def test_a_decoder_without_memory_is_no_fault_of_a_small_image(step, plain, monkeypatch):
    """What libheif says was seen under a limit on memory; see `starving`."""
    from pillow_heif.as_plugin import HeifImageFile

    name = "_open" if step is probe else "load"
    arguments = {"max_pixels": 10**6} if step is probe else {"image_hw": (HIGH, WIDE)}
    kind = SyntaxError if step is probe else RuntimeError
    monkeypatch.setattr(HeifImageFile, name, raising(kind(FAILED)))
    with pytest.raises(BadImage, match=r"^more than this process can allocate$") as found:
        step(plain, **arguments)
    assert found.value.reason == "too much memory"
    monkeypatch.setattr(bad_images, "_has_memory", lambda: False)
    with pytest.raises(MemoryError, match=f"^{FAILED}$"):
        step(plain, **arguments)
    for own_fault in ("Security limit exceeded: 5 bytes", "Invalid image size: zero width"):
        said = f"Memory allocation error: {own_fault}"
        monkeypatch.setattr(HeifImageFile, name, raising(kind(said)))
        with pytest.raises(BadImage) as found:
            step(plain, **arguments)
        assert found.value.reason == ("unreadable" if step is probe else "undecodable")


def test_decoders_that_end_the_process_without_memory_are_not_asked(plain, monkeypatch):
    monkeypatch.setattr(jpegxl, "_LEAST_MEMORY", 2**60)
    for encoded, image_hw in ((plain, (HIGH, WIDE)), (jxl(noise(3)), noise(3).shape[:2])):
        with pytest.raises(BadImage, match=r"^more than this process can allocate$") as found:
            decoded(encoded, image_hw)
        assert found.value.reason == "too much memory"


def test_an_error_of_the_system_while_decoding_is_no_reject(plain, monkeypatch):
    from pillow_heif.as_plugin import HeifImageFile

    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(HeifImageFile, "load", raising(error))
    with pytest.raises(OSError, match="Too many open files"):
        decoded(plain, (HIGH, WIDE))


def test_a_larger_heic_than_is_read_into_memory_is_refused(plain, monkeypatch):
    monkeypatch.setattr(extras, "_MOST_HEIC_BYTES", 100)
    message = f"{len(plain)} bytes, expected at most 100 of a HEIC file"
    with pytest.raises(BadImage, match=f"^{message}$"):
        probe(plain, max_pixels=10**6)


def avif():
    file = BytesIO()
    Image.fromarray(PIXELS).save(file, "AVIF", speed=10)
    return file.getvalue()


def test_brands_tell_heic_from_avif(plain):
    general = plain[:8] + b"mif1" + plain[12:]
    assert (decoded(general, (HIGH, WIDE)) == PIXELS).all()
    kinds = [extras.extra_kind(one[:64]) for one in (plain, general, avif())]
    assert kinds == ["HEIC", "HEIC", None]
    general = avif()[:8] + b"mif1" + avif()[12:]
    assert extras.extra_kind(general[:64]) is None
    assert probe(general, max_pixels=10**6).image_hw == (HIGH, WIDE)


def test_without_the_extra_the_formats_are_rejects_that_name_it(plain, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    for name, encoded in (("HEIC", plain), ("JPEG XL", jxl(noise(3)))):
        remedy = "pip install 'packpipe[formats]' and pack into a new folder"
        message = f"{name} needs the extra formats; {remedy}"
        with pytest.raises(BadImage, match=f"^{re.escape(message)}$") as found:
            probe(encoded, max_pixels=10**6)
        assert found.value.reason == "unreadable"
    assert probe(avif(), max_pixels=10**6).image_hw == (HIGH, WIDE)
    flood = heic_floods()["HEIC many places"]  # whose header is not even read
    with pytest.raises(BadImage, match=r"^HEIC needs the extra formats"):
        probe(flood, max_pixels=10**6)


def test_paths_and_bytes_are_the_same(plain, tmp_path):
    path = tmp_path / "photo.heic"
    path.write_bytes(plain)
    assert probe(str(path), max_pixels=10**6).image_hw == (HIGH, WIDE)
    assert (decoded(str(path), (HIGH, WIDE)) == PIXELS).all()


def test_processes_that_decode_know_the_formats(plain, tmp_path):
    images = [plain, jxl(noise(3)), pictures.encoded_image(16, 16)]
    dataset = pictures.dataset_of(images)
    rows = [
        packpipe.pack(dataset, seq_len=64, output=tmp_path / str(workers), num_workers=workers)
        for workers in (0, 1)
    ]
    assert packpipe.rejects(rows[0]).num_rows == packpipe.rejects(rows[1]).num_rows == 0
    assert rows[0][:] == rows[1][:]
    found = packpipe.manifest(rows[0])["codecs"]
    assert found["pillow-heif"] == version("pillow-heif")
    assert found["pillow-jxl-plugin"] == version("pillow-jxl-plugin")


def test_pillow_learns_nothing_from_headers_and_heic(plain, tmp_path):
    (tmp_path / "a.heic").write_bytes(plain)
    (tmp_path / "b.jxl").write_bytes(jxl(noise(3)))
    script = (
        "import sys\nfrom PIL import Image\nImage.init()\n"
        "before = dict(Image.OPEN), dict(Image.SAVE)\n"
        "from packpipe.images.decode import decode, probe\n"
        "from packpipe.images.rules import pixel_rules\n"
        "from packpipe.planning.image_config import PackConfig\n"
        "rules = pixel_rules(PackConfig())\n"
        "hw = [probe(path, max_pixels=10**6).image_hw for path in sys.argv[1:]]\n"
        "decode(sys.argv[1], image_hw=hw[0], target_hw=(2, 2), rules=rules)\n"
        "assert before == (Image.OPEN, Image.SAVE) and 'pillow_jxl' not in sys.modules\n"
        "decode(sys.argv[2], image_hw=hw[1], target_hw=(2, 2), rules=rules)\n"
        "assert set(Image.OPEN) - set(before[0]) == {'JXL'}, set(Image.OPEN)\n"
    )
    paths = [str(tmp_path / name) for name in ("a.heic", "b.jxl")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
