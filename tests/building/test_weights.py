"""What images weigh: from a column into rows and batches, and into the loss."""

import re

import datasets
import learning
import numpy as np
import packed
import pictures
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packpipe
from packpipe import EpochPacks, PackConfig, PackedLoader
from packpipe.rows import schema
from packpipe.rows.to_arrow import rows_table
from packpipe.training.loop import train
from packpipe.training.objective import objective_of

WEIGHTS = [0.5, 0.0, 2.0, 1.0, 0.25, 3.0, 1.0, 1.0, 0.125]


def source_of(weights=WEIGHTS, kind="float64"):
    images = pictures.encoded_images()
    column = pa.array(weights, kind)
    feature = datasets.Value(kind)
    return pictures.dataset_of(images).add_column("importance", column, feature=feature)


def weights_by_example(batches):
    found = {}
    for batch in batches:
        assert batch.weight.dtype == torch.float32
        assert (batch.weight[~batch.present] == 0).all()
        examples, weights = batch.by_example(batch.weight)
        found |= dict(zip(examples.tolist(), weights.tolist(), strict=True))
    return found


def packed_in(folder, source, **options):
    options = {"num_workers": 0, "progress": False, "weight_column": "importance", **options}
    return packpipe.pack(source, 64, output=folder, **options)


def test_weights_are_stored_and_come_back_by_segment(tmp_path):
    rows = packed_in(tmp_path / "out", source_of())
    assert rows.features.arrow_schema.field("weight").type == pa.list_(pa.float32())
    wanted = dict(enumerate(WEIGHTS))
    assert weights_by_example(PackedLoader(rows, 2, tail="pad")) == wanted
    lazy = packed_in(tmp_path / "lazy", source_of(), materialize=False)
    assert weights_by_example(PackedLoader(lazy, 2, tail="pad")) == wanted
    packs = EpochPacks(source_of(), 64, weight_column="importance")
    assert weights_by_example(PackedLoader(packs, 2, tail="pad")) == wanted
    assert packpipe.verify(tmp_path / "out", source_of()) == []
    problems = packpipe.verify(tmp_path / "out", source_of([9.0, *WEIGHTS[1:]]))
    what = "weight are not those of the source (example 0: 0.5, expected 9.0)"
    assert [problem.what for problem in problems] == [what]


def test_a_state_of_other_weights_is_refused():
    def loader_of(weights):
        return PackedLoader(EpochPacks(source_of(weights), 64, weight_column="importance"), 1)

    state = loader_of(WEIGHTS).state_dict()
    loader_of(WEIGHTS).load_state_dict(state)
    with pytest.raises(ValueError, match=r"^state\['contents'\]\['weights'\] is "):
        loader_of([1.0, *WEIGHTS[1:]]).load_state_dict(state)


def test_bad_weights_are_rejects_and_bad_columns_errors(tmp_path):
    wrong = [-1.0, float("inf"), float("nan"), None, *WEIGHTS[4:]]
    rows = packed_in(tmp_path / "out", source_of(wrong), max_bad_fraction=0.5)
    found = [(one["example_index"], one["exception"][:37]) for one in packpipe.rejects(rows)]
    assert found == [
        (0, "weight is -1.0, expected a finite num"),
        (1, "weight is inf, expected a finite numb"),
        (2, "weight is nan, expected a finite numb"),
        (3, "weight is None, expected a finite num"),
    ]
    for column, message in [
        ("weights", "weight_column is 'weights', expected one of ['image', 'label', 'n', 'import"),
        ("image", "features['image'] is Image(mode=None, decode=True), expected a number an"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            EpochPacks(source_of(), 64, weight_column=column)
    tokens = datasets.Dataset.from_dict({"input_ids": [[1]], "w": [1.0]})
    with pytest.raises(ValueError, match=r"^weight_column is 'w', expected None for tokens; only"):
        packpipe.pack(tokens, 16, weight_column="w")


def table(weights):
    rng = np.random.default_rng(0)
    case = packed.RowSet([[3, 2, 1], [5], [4, 4]], seq_len=8, max_segments=4)
    rows = packed.rows_of(case, labels=pa.array(rng.integers(0, packed.NUM_CLASSES, 6)))
    rows.segments["weight"] = np.array(weights, np.float32)
    config = PackConfig(seq_len=8, patch_size=packed.PATCH_SIZE)
    return rows_table(rows, schema.row_schema(config, pa.int64(), weighted=True))


@given(st.lists(st.floats(0, 4), min_size=6, max_size=6), st.sampled_from([None, "balanced"]))
def test_a_step_has_the_loss_of_a_plain_loop(weights, class_weights):
    loader = PackedLoader(table(weights), 3, max_segments=4, shuffle=False)
    model = packed.model_of("auto", torch.float32)
    (batch,) = loader
    with torch.no_grad():
        logits = model(batch)[batch.present].double()
    labels, own = batch.labels[batch.present].tolist(), batch.weight[batch.present].tolist()
    of_class = dict.fromkeys(labels, 1.0)
    if class_weights:
        of_class = {one: 6 / (packed.NUM_CLASSES * labels.count(one)) for one in labels}
    total = weight = 0.0
    for logit, label, share in zip(logits, labels, own, strict=True):
        share *= of_class[label]
        total += share * -logit.log_softmax(-1)[label].item()
        weight += share
    config = learning.config_of(steps=1, loss="softmax", class_weights=class_weights)
    fresh = PackedLoader(table(weights), 3, max_segments=4, shuffle=False)
    (record,) = train(model, fresh, config)
    assert record.loss == pytest.approx(total / weight if weight else 0.0, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": "equal"}, "class_weights is 'equal', expected one of 'balanced'; 1 for"),
        ({"class_weights": [1, -1]}, "class_weights[1] is -1, expected a finite number, 0 or more"),
        ({"class_weights": [1], "loss": "l1"}, "class_weights is [1], expected None with loss='l1"),
    ],
)
def test_wrong_class_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        learning.config_of(**options)


@pytest.mark.parametrize("make", [np.array, torch.tensor, pa.array, tuple])
def test_class_weights_may_be_an_array(make):
    assert learning.config_of(class_weights=make([1.0, 0.5])).class_weights == (1.0, 0.5)


@pytest.mark.parametrize("wrong", [2.0, np.float32(2.0), torch.tensor(2.0), {0: 2.0}])
def test_class_weights_that_are_no_list_are_refused(wrong):
    message = (
        r"^class_weights is .*2\.0.*, expected 'balanced' or a number for each class; 1 for al"
    )
    with pytest.raises(TypeError, match=message):
        learning.config_of(class_weights=wrong)


def test_class_weights_must_fit_the_model_and_the_labels():
    config, cpu = learning.config_of(class_weights=[1.0, 2.0]), torch.device("cpu")
    shape = packed.model_of("auto", torch.float32).config
    message = r"^len\(class_weights\) is 2, expected 5, one a class; give one for each output of"
    with pytest.raises(ValueError, match=message):
        objective_of(config, None, shape, cpu)
    config = learning.config_of(class_weights="balanced")
    message = "^class_weights is 'balanced', expected a list of numbers, unless packs know the cl"
    with pytest.raises(ValueError, match=message):
        objective_of(config, object(), shape, cpu)
