"""What a loader's state says of the data it belongs to, and which other data it is kept from."""

from __future__ import annotations

import json
import re
from io import BytesIO

import datasets
import loading
import naive_profiles
import numpy as np
import pictures
import pytest
import strategies
from PIL import Image as PillowImage

import packpipe
from packpipe import EpochPacks, PackedLoader
from packpipe.loading import stored
from packpipe.rows import digests

NUM = 12
SIDE = 48
OPTIONS = {"patch_size": 8, "resolution": packpipe.Side(16), "max_segments": 6, "seq_len": 16}


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encoded(number: int) -> bytes:
    """Images of one size, and as files of one length, too."""
    buffer = BytesIO()
    PillowImage.fromarray(noise(number)).save(buffer, "BMP")
    return buffer.getvalue()


def images(other: int | None = None) -> list[bytes]:
    """The bytes of all images; one of them, if it is named, another one than usual."""
    assert len({len(encoded(number)) for number in range(3)}) == 1
    return [encoded(number + 100 * (number == other)) for number in range(NUM)]


def source(other: int | None = None, label: int | None = None) -> datasets.Dataset:
    labels = [number % 3 for number in range(NUM)]
    if label is not None:
        labels[label] = (labels[label] + 1) % 3
    return pictures.dataset_of(images(other), labels).select_columns(["image", "label"])


def texts(other: int | None = None, target: int | None = None) -> datasets.Dataset:
    rows = [[number] * (number % 5 + 3) for number in range(NUM)]
    targets = [list(row) for row in rows]
    if other is not None:
        rows[other][1] += 100
    if target is not None:
        targets[target][1] += 100
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": targets})


def packed(folder, dataset, **options):
    """Rows in a folder with a manifest."""
    options = {**(OPTIONS if "image" in dataset.features else {"seq_len": 16}), **options}
    return packpipe.pack(dataset, output=folder, progress=False, num_workers=0, **options)


def mapped(_, dataset, **options):
    """Rows in memory, of which no file says anything."""
    options = {**(OPTIONS if "image" in dataset.features else {"seq_len": 16}), **options}
    packer = packpipe.Packer(**options)
    return dataset.map(packer, batched=True, with_indices=True, remove_columns=dataset.column_names)


def computed(folder, dataset, **options):
    return packed(folder, dataset, materialize=False, **options)


def planned(_, dataset, **options):
    return EpochPacks(dataset, **{**OPTIONS, **options}, num_workers=1)


def in_files(folder, dataset):
    """The same images by their paths, in files of one length."""
    folder.mkdir()
    names = [str(folder / f"{number}.bmp") for number in range(NUM)]
    for name, image in zip(names, dataset.with_format("arrow")[:]["image"], strict=True):
        with open(name, "wb") as file:
            file.write(image["bytes"].as_py())
    columns = {"image": names, "label": dataset["label"]}
    return datasets.Dataset.from_dict(columns, dataset.features)


def as_arrays(_, dataset):
    """The same images as arrays of pixels."""
    features = datasets.Features(
        image=datasets.Array3D((SIDE, SIDE, 3), "uint8"), label=dataset.features["label"]
    )
    pixels = [np.asarray(image) for image in dataset["image"]]
    return datasets.Dataset.from_dict({"image": pixels, "label": dataset["label"]}, features)


def none(_, dataset):
    return dataset


def shuffled(_, dataset):
    return dataset.shuffle(seed=1)


REASONS = {
    "files": "the files hold others: use the folder of the state, or a copy of it",
    "labels": "the labels are others: use the data of the state",
    "rows": "pixels or tokens are others, of 16 MB that are compared: use the data of the state",
    "images": "the images are others, in length or in 16 MB of them: use the data of the state",
    "options": "the rows are computed in another way: use the options of the state",
    "max_segments": "pass it as max_segments, else batches have another shape",
}


@pytest.mark.parametrize(
    ("make", "made", "reason"),
    [
        (packed, none, "rows"),
        (packed, shuffled, "rows"),
        (mapped, none, "rows"),
        (computed, none, "images"),
        (computed, in_files, "images"),
        (planned, none, "images"),
        (planned, shuffled, "images"),
        (planned, in_files, "images"),
        (planned, as_arrays, "images"),
    ],
)
def test_a_state_is_kept_from_other_pixels_of_the_same_sizes(tmp_path, make, made, reason):
    one, again, other = (
        make(tmp_path / f"rows {which}", made(tmp_path / which, source(changed)))
        for which, changed in (("one", None), ("again", None), ("other", NUM - 1))
    )
    is_kept_from(one, again, other, reason)


@pytest.mark.parametrize(
    ("make", "made"),
    [(packed, none), (packed, shuffled), (mapped, none), (computed, none), (planned, shuffled)],
)
def test_a_state_is_kept_from_other_labels(tmp_path, make, made):
    one, again, other = (
        make(tmp_path / which, made(None, source(label=changed)))
        for which, changed in (("one", None), ("again", None), ("other", 5))
    )
    is_kept_from(one, again, other, "labels")


@pytest.mark.parametrize("make", [packed, planned])
def test_a_state_with_labels_is_kept_from_images_without(tmp_path, make):
    one, again = (make(tmp_path / which, source()) for which in ("one", "again"))
    other = make(tmp_path / "other", source(), label_column=None)
    is_kept_from(one, again, other, "labels")


@pytest.mark.parametrize(
    ("make", "made", "change"),
    [
        (packed, none, {"other": NUM - 1}),
        (mapped, none, {"other": 0}),
        (packed, shuffled, {"target": 4}),
    ],
)
def test_a_state_is_kept_from_other_texts_of_the_same_lengths(tmp_path, make, made, change):
    one, again = (make(tmp_path / which, made(None, texts())) for which in ("one", "again"))
    is_kept_from(one, again, make(tmp_path / "other", made(None, texts(**change))), "rows")


@pytest.mark.parametrize(
    ("make", "option", "reason"),
    [
        (packed, {"reducing_gap": 1.0}, "rows"),
        (mapped, {"downscale_filter": "lanczos"}, "rows"),
        (computed, {"reducing_gap": 1.0}, "options"),
        (planned, {"reducing_gap": 1.0}, None),
        (computed, {"profiles": "ignore"}, "options"),
        (packed, {"drop_rate": 0.5}, None),  # known by the plan
    ],
)
def test_a_state_is_kept_from_images_made_in_another_way(tmp_path, make, option, reason):
    photos = [pictures.encoded_image(SIDE, SIDE, number, "JPEG") for number in range(NUM)]
    dataset = pictures.dataset_of(photos)
    usual = {"drop_rate": 0.25, "reducing_gap": 3.0}
    one, again, other = (
        make(tmp_path / which, dataset, **options)
        for which, options in (("one", usual), ("again", usual), ("other", usual | option))
    )
    is_kept_from(one, again, other, reason)


def is_kept_from(one, again, other, reason) -> None:
    """Check that a state of one's rows goes on with the same rows made again, not with others."""
    loader = PackedLoader(one, 1)
    batches = iter(loader)
    next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    wanted = [loading.digest(batch) for batch in batches]
    assert wanted
    resumed = PackedLoader(again, 1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [loading.digest(batch) for batch in resumed] == wanted
    assert_refused(other, state, reason)


def assert_refused(packs, state, reason) -> None:
    loader = PackedLoader(packs, 1)
    before = loader.state_dict()
    if reason is None:
        message = r"state\['fingerprint'\] is .*; the packs are others: .*"
    else:
        sides = state["contents"][reason], before["contents"][reason]
        message = re.escape(
            f"state['contents'][{reason!r}] is {sides[0]!r}, expected {sides[1]!r}; "
            f"{REASONS[reason]}"
        )
    with pytest.raises(ValueError, match=f"^{message}$"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


def state_of(packs, **options):
    loader = PackedLoader(packs, 1, **options)
    next(iter(loader))
    return json.loads(json.dumps(loader.state_dict()))


# What versions without the option `profiles` wrote for these packs.
PACKED_BEFORE = {"profiles": "ignore", "damaged_scans": "keep", "jpeg_edges": "padded"}
FINGERPRINTS_BEFORE = {
    "plan": "82bf618220be0c38ac87dcba92705135",
    "stream": (
        "PackConfig(seq_len=16, patch_size=8, resolution=Side(pixels=Constant(value=16), "
        "rounding='nearest'), max_tokens=None, max_upscale=None, drop_rate=0.0, epochs=None, "
        "fit_last=None, fit_limit=0.25, max_segments=6, strategy='best_fit', window=16384, "
        "background=(255, 255, 255), reducing_gap=1.0, downscale_filter='bicubic', "
        "upscale_filter='bicubic', max_pixels=178956970) open_packs=64 num_examples=None "
        "columns='image', 'label'"
    ),
}


def streamed(_, dataset, **options):
    return packpipe.PackedStream(dataset.to_iterable_dataset(), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("make", "fingerprint"), [(planned, "plan"), (streamed, "stream")], ids=["plan", "stream"]
)
def test_a_state_from_before_some_options_goes_on_without_them_or_is_refused_by_name(
    make, fingerprint
):
    wide = naive_profiles.rgb_profile(naive_profiles.ADOBE, 2.2)
    photos = [
        strategies.encode(PillowImage.fromarray(noise(n)), "PNG", icc_profile=wide)
        for n in range(NUM)
    ]
    dataset = pictures.dataset_of(photos, [n % 3 for n in range(NUM)]).select_columns(
        ["image", "label"]
    )
    before = make(None, dataset, **PACKED_BEFORE)
    loader = PackedLoader(before, 1, seed=3)
    loader.set_epoch(1)
    batches = iter(loader)
    first = next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["fingerprint"] == FINGERPRINTS_BEFORE[fingerprint]
    wanted = [loading.digest(batch) for batch in batches]
    assert wanted
    resumed = PackedLoader(make(None, dataset, **PACKED_BEFORE), 1, seed=3)
    resumed.load_state_dict(state)
    assert [loading.digest(batch) for batch in resumed] == wanted
    other = PackedLoader(make(None, dataset), 1, seed=3)
    other.set_epoch(1)
    batch = next(iter(other))
    assert loading.digest(batch) != loading.digest(first)  # whose colours are others
    message = (
        "it comes from before some options were there: pass profiles='ignore', damaged_scans='keep'"
    )
    edges = "jpeg_edges='padded'"
    with pytest.raises(ValueError, match=f"^state\\['fingerprint'\\] is .*; {message}, {edges}$"):
        other.load_state_dict(state)
    if fingerprint == "stream":  # a plan with a crop has other arrays, so nothing tells it from any
        cropped = PackedLoader(make(None, dataset, crop=packpipe.CenterCrop()), 1, seed=3)
        with pytest.raises(ValueError, match=f"; {message}, crop=None, {edges}$"):
            cropped.load_state_dict(state)


def test_a_state_is_kept_from_another_byte_anywhere_in_files_of_known_checksums(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 64)
    one, again, other = (
        packed(tmp_path / which, source(changed))
        for which, changed in (("one", None), ("again", None), ("other", NUM // 2))
    )
    state, before = state_of(one), PackedLoader(other, 1).state_dict()
    assert state["contents"]["rows"] == before["contents"]["rows"]  # the sample misses it
    PackedLoader(again, 1).load_state_dict(state)
    # Selections of rows lie in the same files.
    state = state_of(one.shuffle(seed=2))
    PackedLoader(again.shuffle(seed=2), 1).load_state_dict(state)
    for rows in (other, datasets.load_from_disk(tmp_path / "other")):
        assert_refused(rows.shuffle(seed=2), state, "files")


def test_images_that_are_not_read_are_known_by_their_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SAMPLE_BYTES", 64)
    photos = [pictures.encoded_image(SIDE, SIDE, number, "JPEG") for number in range(NUM)]
    others = [*photos[:7], pictures.encoded_image(SIDE, SIDE, 77, "JPEG"), *photos[8:]]
    assert len(photos[7]) != len(others[7])
    for made in (none, in_files):
        one, again, other = (
            planned(
                None, made(tmp_path / f"{number}", pictures.dataset_of(some).remove_columns("n"))
            )
            for number, some in enumerate((photos, photos, others))
        )
        PackedLoader(again, 1).load_state_dict(state_of(one))
        assert_refused(other, state_of(one), "images")


def test_the_same_images_are_the_same_wherever_they_lie(tmp_path):
    wanted = planned(None, source()).contents()
    source().save_to_disk(tmp_path / "saved")
    parts = [source().select(range(5)), source().select(range(5, NUM))]
    for dataset in (
        in_files(tmp_path / "files", source()),
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.concatenate_datasets(parts),
        source().select([*range(1, NUM), 0]).select([NUM - 1, *range(NUM - 1)]),
    ):
        assert planned(None, dataset).contents() == wanted
    assert planned(None, datasets.concatenate_datasets(parts[::-1])).contents() != wanted


def test_images_that_cannot_be_read_have_digests_too(tmp_path):
    dataset = in_files(tmp_path / "files", source())
    table = dataset.with_format("arrow")[:]
    values = [*table["image"].to_pylist()[:4], None]
    values += [{"bytes": None, "path": name} for name in ("gone", str(tmp_path), "nul\0")]
    images = datasets.Dataset.from_dict(
        {"image": values, "label": [0] * len(values)}, features=dataset.features
    )
    options = {"max_bad_fraction": 0.9}
    wanted = planned(None, images, **options).contents()
    assert planned(None, images.shuffle(seed=3), **options).contents() != wanted
    rooted = planned(None, images, **options, image_root=tmp_path / "files").contents()
    assert rooted == wanted
    (tmp_path / "files" / "2.bmp").write_bytes(b"other")
    assert planned(None, images, **options).contents() != wanted


def test_the_same_rows_are_the_same_wherever_they_lie(tmp_path):
    one = packed(tmp_path / "one", source())
    state = state_of(one)
    one.save_to_disk(tmp_path / "saved")
    for rows in (
        datasets.load_from_disk(tmp_path / "saved"),
        one.with_format("arrow")[:],
        one.with_format("torch"),
        one.select(range(3)),
    ):
        if len(rows) == len(one):
            PackedLoader(rows, 1).load_state_dict(state)
        else:
            with pytest.raises(ValueError, match=r"^state\['fingerprint'\]"):
                PackedLoader(rows, 1).load_state_dict(state)


def test_batches_of_another_shape_are_no_continuation(tmp_path):
    rows = packed(tmp_path / "rows", source())
    assert_refused(rows, state_of(rows, max_segments=9), "max_segments")


@pytest.mark.parametrize("make", [packed, computed, planned])
def test_a_state_of_an_earlier_version_is_continued_and_says_what_it_does_not_know(
    tmp_path, make, caplog
):
    packs = make(tmp_path / "rows", source())
    loader = PackedLoader(packs, 1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    wanted = [loading.digest(batch) for batch in batches]
    names = " and ".join(sorted(state.pop("contents").keys() - {"max_segments", "labels"}))
    resumed = PackedLoader(packs, 1)
    resumed.load_state_dict(state)
    (message,) = caplog.messages
    assert message == (
        f"the state does not say which {names} it belongs to: use those of before, since others "
        "of the same sizes would go unnoticed"
    )
    assert [loading.digest(batch) for batch in resumed] == wanted
    # Other sizes, it does know.
    with pytest.raises(ValueError, match=r"^state\['fingerprint'\] is "):
        PackedLoader(make(tmp_path / "less", source().select(range(9))), 1).load_state_dict(state)


def test_contents_are_a_dict(tmp_path):
    rows = packed(tmp_path / "rows", source())
    message = "state['contents'] is [1], expected a dict; pass what state_dict returned"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PackedLoader(rows, 1).load_state_dict({**state_of(rows), "contents": [1]})


def test_data_is_looked_at_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(stored, "sample_digest", lambda *_: calls.append(1) or "rows")
    loader = PackedLoader(packed(tmp_path / "rows", source()), 1)
    states = [loader.state_dict() for _ in range(3)]
    loader.load_state_dict(states[0])
    loader.state_dict()["contents"].clear()
    assert loader.state_dict() == states[0] == states[2]
    assert calls == [1]


def test_a_state_is_kept_from_other_values_beside_the_same_tokens(tmp_path):
    def labelled(values):
        rows = {"input_ids": [[number] * 3 for number in range(NUM)], "label": values}
        return mapped(tmp_path, datasets.Dataset.from_dict(rows), seq_len=16)

    values = [number % 2 for number in range(NUM)]
    loader = PackedLoader(labelled(values), 1, rank=0, world_size=1)
    state = loader.state_dict()
    PackedLoader(labelled(values), 1, rank=0, world_size=1).load_state_dict(state)
    other = PackedLoader(labelled([1 - value for value in values]), 1, rank=0, world_size=1)
    with pytest.raises(
        ValueError, match=r"state\['contents'\]\['values'\] is .* numbers are others"
    ):
        other.load_state_dict(state)
