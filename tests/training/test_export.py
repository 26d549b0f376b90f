"""A model in an ONNX file answers as the model does, and no image sees another there, either."""

import json
import os
import re
from dataclasses import replace

import learning
import numpy as np
import onnx
import packed
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

import packpipe
from packpipe import Constant, OnnxModel, PackConfig, Square, View
from packpipe.cli.main import app
from packpipe.loading.image_packs import image_packs
from packpipe.model.maps import class_map
from packpipe.model.pooling import POOLINGS
from packpipe.model.positions import POSITIONS
from packpipe.training import export
from packpipe.training.loop import train
from packpipe.training.run_folder import RunOptions

NAMES = ("ant", "bee", "cat", "dog", "elk")
SEQ_LEN, SEGMENTS, ROWS = 32, 8, 2
PACKING = PackConfig(
    seq_len=SEQ_LEN, patch_size=2, resolution="budget", max_tokens=12, max_segments=SEGMENTS
)
OPTIONS = RunOptions(class_names=NAMES, loss="softmax", packing=PACKING)
draw = np.random.default_rng(0)
IMAGES = [draw.integers(0, 256, (*draw.integers(1, 40, 2), 3), dtype=np.uint8) for _ in range(17)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = learning.config_of(steps=2)
    list(
        train(learning.model_of(), learning.loader_of(), config, folder=folder, run_options=OPTIONS)
    )
    return folder


@pytest.fixture(scope="module")
def said(run, tmp_path_factory):
    """What the command printed, and the file it wrote, in a folder that it made."""
    file = tmp_path_factory.mktemp("exported") / "new" / "model.onnx"
    arguments = ["export", str(run), str(file), "--batch-size", str(ROWS)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output, file


@pytest.fixture(scope="module")
def exported(said):
    return OnnxModel(said[1])


@pytest.fixture(scope="module")
def model(run):
    return packpipe.load_model(run)[0]


def test_the_command_says_what_it_wrote_and_that_it_was_checked(said):
    printed, file = said
    assert f"{ROWS} of {SEQ_LEN} tokens a call" in printed
    assert "at most 12 tokens each" in printed
    found = re.search(r"onnxruntime's outputs are the model's to (\S+) of the largest", printed)
    assert float(found[1]) < 1e-5
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]


def test_the_file_alone_says_how_it_is_asked(said, exported):
    assert exported.class_names == NAMES
    assert exported.packing == PACKING
    assert (exported.batch_size, exported.is_dense) == (ROWS, False)
    # No path of the machine that wrote it.
    assert not re.search(rb"site-packages|\.py\b", said[1].read_bytes())


def test_each_answer_is_the_models_in_the_order_of_the_images(exported, model):
    packs = image_packs(IMAGES, PACKING)
    assert len(packs.plan) > ROWS
    assert max(len(pack) for pack in packs.plan.packs) > 1
    wanted = packpipe.predict(model, IMAGES, **PACKING.to_options())
    found = exported.predict(iter(IMAGES))
    assert found.dtype == np.float32
    assert np.abs(found - wanted.numpy()).max() < 1e-5
    shares = exported.probabilities(IMAGES)
    assert np.abs(shares - wanted.softmax(-1).numpy()).max() < 1e-6
    vectors = exported.embed(IMAGES)
    assert np.abs(vectors @ model.head.weight.detach().numpy().T - found).max() < 1e-5
    assert exported.predict([]).shape == (0, 5)


@st.composite
def batches(draw):
    """Rows of other images than the graph was traced with: full ones, some padding, empty ones."""
    lens = []
    for _ in range(ROWS):
        cuts = sorted(draw(st.sets(st.integers(1, SEQ_LEN), max_size=SEGMENTS)))
        lens.append([b - a for a, b in zip([0, *cuts], cuts, strict=False)])
    case = packed.RowSet(lens, SEQ_LEN, SEGMENTS, draw(st.integers(0, 1000)))
    assume(any(len(row) > 1 for row in lens))
    return packed.batch_of(case, labels=None)


def outputs_of(exported, batch):
    return [torch.from_numpy(one) for one in exported.run({n: batch[n].numpy() for n in batch})]


@given(batches())
def test_any_rows_are_answered_as_by_the_model(exported, model, batch):
    outputs, features = outputs_of(exported, batch)
    with torch.no_grad():
        wanted = model(batch)
    assert outputs.isfinite().all()
    assert features.isfinite().all()
    assert (outputs - wanted)[batch.present].abs().max() < 1e-5


@given(batches(), st.data())
def test_no_image_sees_another(exported, batch, data):
    row, number = data.draw(st.sampled_from(batch.present.nonzero().tolist()))
    patches = batch.patches.clone()
    patches[row][batch.segment_ids[row] == number + 1] ^= 255
    before, after = (
        outputs_of(exported, batch),
        outputs_of(exported, replace(batch, patches=patches)),
    )
    others = batch.present.clone()
    others[row, number] = False
    assert others.any()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[others], other[others])
        assert not torch.equal(one[row, number], other[row, number])


def test_without_pooling_each_answer_is_a_map(said, monkeypatch):
    dense = OnnxModel(changed(said[1], pooling="none"))
    # What the graph of such a model would give, were it the colour of a patch's first pixel.
    monkeypatch.setattr(
        dense, "run", lambda batch: [batch["patches"][..., :3].astype(np.float32)] * 2
    )
    native = replace(PACKING, resolution="native", max_tokens=None, seq_len=400)
    monkeypatch.setattr(dense, "packing", native)
    images = [image.repeat(2, 0).repeat(2, 1)[:38, :38] for image in IMAGES]
    for one, image in zip(dense.predict(images), images, strict=True):
        assert np.array_equal(one, image[::2, ::2])


def test_a_map_has_cells_where_the_model_has(tmp_path):
    model = packed.model_of(
        dtype=torch.float32, num_classes=3, pooling="none", target_stride=1, depth=1
    )
    packpipe.export_onnx(model, OPTIONS, tmp_path / "m.onnx")
    exported = OnnxModel(tmp_path / "m.onnx")
    wanted = packpipe.predict(model, IMAGES, **PACKING.to_options())
    shares = exported.probabilities(IMAGES)
    for one, share, answer in zip(exported.predict(IMAGES), shares, wanted, strict=True):
        assert one.shape == answer.shape
        assert one.shape[2:] == (4, 3)
        assert np.abs(one - answer.numpy()).max() < 1e-5
        assert np.abs(share - answer.softmax(-1).numpy()).max() < 1e-6
        assert torch.equal(class_map(torch.from_numpy(one), 2), class_map(answer, 2))


# Each kind takes seconds to trace.
KINDS = []
if os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
    KINDS = [("learned_2d_fractional", "none", "unit", 3)]
    KINDS += [(position, "attention", "linear", None) for position in POSITIONS]
    KINDS += [("rotary", pooling, "linear", 3) for pooling in POOLINGS]


@pytest.mark.parametrize(("position", "pooling", "head", "num_classes"), KINDS)
def test_other_kinds_of_models_are_exported(position, pooling, head, num_classes, tmp_path):
    model = packed.model_of(
        "auto",
        torch.float32,
        position=position,
        pooling=pooling,
        head=head,
        num_classes=num_classes,
        depth=1,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert packpipe.export_onnx(model.train(), OPTIONS, tmp_path / "m.onnx", seq_len=40) < 1e-5
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exported = OnnxModel(tmp_path / "m.onnx")
    assert exported.packing == replace(PACKING, seq_len=40)
    wanted = packpipe.predict(model, IMAGES, **PACKING.to_options())
    for one, answer in zip(exported.predict(IMAGES), wanted, strict=True):
        assert one.shape == answer.shape
        assert np.abs(one - answer.numpy()).max() < 1e-5
    if num_classes is None:
        assert np.array_equal(exported.embed(IMAGES), exported.predict(IMAGES))


def test_an_image_that_cannot_be_read_is_named(exported):
    with pytest.raises(ValueError, match=r"images\[1\] is '.*', expected an image that can be"):
        exported.predict([IMAGES[0], b"no image"])


def test_a_file_that_is_there_is_kept(said, model):
    before = said[1].read_bytes()
    with pytest.raises(FileExistsError, match="expected a file that is not there yet; remove it"):
        packpipe.export_onnx(model, OPTIONS, said[1])
    assert said[1].read_bytes() == before


def test_a_file_that_answers_otherwise_than_the_model_is_not_written(said, tmp_path, monkeypatch):
    # Traced already: what onnxruntime makes of it is compared with a model of other weights.
    encoded = said[1].read_bytes()
    monkeypatch.setattr(export, "_encoded", lambda *_: encoded)
    other = packed.model_of(dtype=torch.float32, seed=1)
    message = r"difference of onnxruntime's outputs is .*, expected at most 0.0001 from the model;"
    with pytest.raises(RuntimeError, match=message):
        packpipe.export_onnx(other, OPTIONS, tmp_path / "m.onnx", batch_size=ROWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_rate": 0.5}, "drop_rate is 0.5, expected its default, since fewer tokens come"),
        ({"fit_last": "resolution"}, "fit_last is 'resolution', expected its default, since"),
        ({"views": 2}, "views is 2, expected 1, an output an image; pass rows of several to"),
        (
            {"views": (View(max_tokens=4),) * 2, "resolution": "native", "max_tokens": None},
            "views is 2, expected 1, an output an image",
        ),
        ({"patch_size": 16}, "patch_size of the options is 16, expected 2 (the model's); give"),
    ],
)
def test_options_that_do_not_suit_are_refused(changes, message, model, tmp_path):
    options = RunOptions(packing=replace(PACKING, **changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        packpipe.export_onnx(model, options, tmp_path / "m.onnx")


def test_what_cannot_be_exported_is_named(model, tmp_path, monkeypatch):
    file = tmp_path / "m.onnx"
    with pytest.raises(
        TypeError, match=r"type\(model\) is 'Linear', expected 'NaViT'; export other"
    ):
        packpipe.export_onnx(torch.nn.Linear(2, 2), OPTIONS, file)
    with pytest.raises(ValueError, match=r"batch_size is 0, expected an integer in 1\.\.32767"):
        packpipe.export_onnx(model, OPTIONS, file, batch_size=0)
    with pytest.raises(ValueError, match=r"max_tokens is 12, expected an integer in 1\.\.8; an im"):
        packpipe.export_onnx(model, OPTIONS, file, seq_len=8)
    for options in ({"resolution": Square(Constant(6))}, {"resolution": "native"}):
        whole = PackConfig(seq_len=9, patch_size=2, **options)
        with pytest.raises(
            ValueError, match="seq_len is 8, expected at least 9, the tokens of an image; leave"
        ):
            packpipe.export_onnx(model, RunOptions(packing=whole), file, seq_len=8)
    monkeypatch.setattr(export, "_MOST_WEIGHT_BYTES", 1000)
    message = r"bytes of the weights is \d+, expected at most 1000, since one ONNX file holds less"
    with pytest.raises(ValueError, match=message):
        packpipe.export_onnx(model, OPTIONS, file)


def changed(file, **about):
    """The bytes of a file whose metadata say something else; without any, none of packpipe's."""
    proto = onnx.load(file)
    (told,) = (one for one in proto.metadata_props if one.key == "packpipe")
    if about:
        told.value = json.dumps({**json.loads(told.value), **about})
    else:
        proto.metadata_props.remove(told)
    return proto.SerializeToString()


def test_files_of_others_and_of_later_versions_are_refused(said, tmp_path):
    message = "version of packpipe's metadata is 'missing', expected 1, as packpipe export writes"
    with pytest.raises(ValueError, match=message):
        OnnxModel(changed(said[1]))
    with pytest.raises(ValueError, match="version of packpipe's metadata is 2, expected 1, as"):
        OnnxModel(changed(said[1], version=2))
    with pytest.raises(FileNotFoundError, match="is no file; write one with packpipe export"):
        OnnxModel(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    junk = re.escape(f"file is '{tmp_path / 'junk.onnx'}', expected an ONNX model; write one with")
    with pytest.raises(ValueError, match=junk):
        OnnxModel(tmp_path / "junk.onnx")
    with pytest.raises(ValueError, match="file is '0 bytes', expected an ONNX model; write one"):
        OnnxModel(b"")


def test_what_the_file_cannot_answer_is_refused(said):
    short = OnnxModel(changed(said[1], max_side=5))
    message = "grid_hw is 12, expected at most 5 patches an axis (max_side); export with fewer"
    with pytest.raises(ValueError, match=re.escape(message)):
        short.predict([np.zeros((2, 90, 3), np.uint8)])
    for loss in ("mse", "l1"):
        other = OnnxModel(changed(said[1], run={**OPTIONS.to_dict(), "loss": loss}))
        message = f"loss is '{loss}', expected 'sigmoid' or 'softmax', for .*; use predict$"
        with pytest.raises(ValueError, match=message):
            other.probabilities(IMAGES)
    numbers = other.predict(IMAGES)
    sigmoid = OnnxModel(changed(said[1], run={**OPTIONS.to_dict(), "loss": "sigmoid"}))
    wanted = torch.from_numpy(numbers).sigmoid().numpy()
    assert np.abs(sigmoid.probabilities(IMAGES) - wanted).max() < 1e-6
