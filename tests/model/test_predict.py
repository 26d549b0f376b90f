"""Predictions come in the order of the images, as if each had been seen alone."""

import re
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from packpipe import CenterCrop, PackConfig, PackedBatch, Side, Uniform, plan_epoch
from packpipe.images.decode import decode
from packpipe.images.rules import pixel_rules
from packpipe.model.config import NaViTConfig
from packpipe.model.navit import NaViT
from packpipe.model.predict import predict
from packpipe.philox import Key
from packpipe.rows.fill_images import fill_rows, planned_images
from packpipe.samples import images_folder

FILES = sorted(path for path in images_folder().rglob("*") if path.suffix in (".png", ".jpg"))[::8]


def model_of(**options):
    torch.manual_seed(0)
    return NaViT(NaViTConfig(num_classes=4, dim=32, depth=2, heads=2, **options)).double()


def alone(model, file, **options):
    """What the model says of one image in a row of its own."""
    config = PackConfig(seq_len=512, **options)
    with Image.open(file) as image:
        image_hw = image.height, image.width
    segments = planned_images(plan_epoch([image_hw], config), range(1), None)
    rows, *_ = fill_rows(segments, lambda _: str(file), config, Key(0, 0))
    with torch.inference_mode():
        return model(PackedBatch.from_rows(rows, max_segments=1))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"resolution": "budget", "max_tokens": 40, "crop": CenterCrop(0.6, "square")}],
    ids=["native", "cropped budget"],
)
def test_each_answer_is_that_of_its_image_alone(options, num_workers):
    model = model_of()
    found = model.predict(FILES, seq_len=512, batch_size=3, num_workers=num_workers, **options)
    assert found.shape == (len(FILES), 4)
    assert len(FILES) > 20
    for file, answer in zip(FILES, found, strict=True):
        assert (alone(model, file, **options)[0, 0] - answer).abs().max() < 1e-10
    assert model.training


def test_a_crop_is_answered_as_the_image_that_it_leaves():
    model, cut, rules = model_of(), [], pixel_rules(PackConfig())
    for file in FILES[:5]:
        with Image.open(file) as image:
            image_hw = image.height, image.width
        rgb = decode(str(file), image_hw=image_hw, target_hw=image_hw, rules=rules).pixels
        height, width = (round(side / 2) for side in rgb.shape[:2])
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        cut.append(rgb[top : top + height, left : left + width])
    options = {"seq_len": 512, "reducing_gap": None}
    wanted = model.predict(cut, **options)
    found = model.predict(FILES[:5], crop=CenterCrop(0.25), **options)
    assert (found - wanted).abs().max() < 1e-12
    assert (found - model.predict(FILES[:5], **options)).abs().max() > 1e-6


def test_images_may_be_bytes_paths_arrays_or_pillow_images_from_any_iterable():
    model, file = model_of(), FILES[0]
    with Image.open(file) as image:
        pixels = image.convert("RGB")
    encoded = file.read_bytes()
    files = [encoded, str(file), Path(file), bytearray(encoded), memoryview(encoded)]
    files += [BytesIO(encoded), file.open("rb"), {"bytes": encoded, "path": None}, f"file://{file}"]
    kinds = (kind for kind in (*files, np.asarray(pixels), pixels))
    found = model.predict(kinds, seq_len=512)
    assert (found[: len(files)] - found[0]).abs().max() < 1e-12
    assert (found[-1] - found[-2]).abs().max() < 1e-12
    files[6].close()


@pytest.mark.parametrize(
    "form", [str, Path, Path.read_bytes, lambda file: BytesIO(file.read_bytes()), Image.open]
)
def test_one_image_alone_is_answered_alone(form):
    model = model_of()
    found = model.predict(form(FILES[0]), seq_len=512)
    assert found.shape == (1, 4)
    assert (found - model.predict([FILES[0]], seq_len=512)).abs().max() < 1e-12


def test_settings_of_the_callers_that_give_other_pixels_are_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    message = "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, expected False; set it back before"
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(model_of(), FILES[:1])


def test_what_is_no_image_is_named():
    message = "type(images[1]) is 'int', expected bytes, a path or pixels; pass one image after"
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(model_of(), [FILES[0], 3])
    for shape in ([48, 16, 3], [3, 48, 16]):
        message = f"images.shape is {shape}, expected a list of arrays, channels last; pass [image]"
        with pytest.raises(ValueError, match=re.escape(message)):
            predict(model_of(), np.zeros(shape, np.uint8))
    assert predict(model_of(), np.zeros((2, 48, 16, 3), np.uint8)).shape == (2, 4)


def test_a_path_with_a_scheme_is_read():
    memory = fsspec.filesystem("memory")
    memory.pipe("/packpipe/predict", FILES[0].read_bytes())
    model = model_of()
    found = model.predict("memory://packpipe/predict", seq_len=512)
    assert (found - model.predict([FILES[0]], seq_len=512)).abs().max() < 1e-12
    memory.rm("/packpipe", recursive=True)
    with pytest.raises(
        ValueError, match=r"images\[0\] is .*memory:// holds the files of one process"
    ):
        model.predict(["memory://packpipe/predict"])


def test_without_pooling_each_answer_is_a_map():
    model = model_of(pooling="none")
    pixels = [np.zeros((height, width, 3), np.uint8) for height, width in ((48, 16), (32, 64))]
    assert [tuple(one.shape) for one in predict(model, pixels)] == [(3, 1, 4), (2, 4, 4)]


def test_no_images_give_no_answers():
    assert predict(model_of(), []).shape == (0, 4)


def test_an_image_that_cannot_be_read_is_named():
    broken = FILES[0].read_bytes()[:200]
    message = r"images\[1\] is '.*', expected an image that can be read"
    with pytest.raises(ValueError, match=message):
        predict(model_of(), [FILES[0], b"no image", FILES[1]])
    model = model_of().train()
    with pytest.raises(ValueError, match=message):
        predict(model, [FILES[0], broken])
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 32}, "patch_size is 32, expected 16 (the model's); leave it out"),
        ({"drop_rate": 0.5}, "drop_rate is 0.5, expected its default, since fewer tokens come"),
        ({"fit_last": "drop_rate"}, "fit_last is 'drop_rate', expected its default, since fewer"),
    ],
)
def test_options_that_do_not_suit_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(model_of(), FILES[:1], **options)


def test_a_drawn_resolution_is_drawn_by_the_number_of_the_image():
    model = model_of()
    options = {"resolution": Side(Uniform(32, 96))}
    found = model.predict(FILES[:4], **options)
    assert torch.equal(model.predict(FILES[:4], **options), found)
    buffer = BytesIO(FILES[2].read_bytes())
    again = model.predict([FILES[0], FILES[1], buffer.getvalue()], **options)
    assert (again - found[:3]).abs().max() < 1e-10
