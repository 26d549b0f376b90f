"""Trainers of others take a step on packed rows: the loss and gradients of the sequences alone."""

from __future__ import annotations

import consumers
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

# The frameworks' own: of deprecated calls, of few workers and of the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(
    "consumer",
    [
        consumers.hf_trainer,
        consumers.sft_trainer,
        consumers.lightning,
        consumers.with_accelerate,
    ],
)
def test_a_trainer_s_step_is_that_of_the_sequences_alone(tmp_path, consumer, micro_batches):
    pair = consumer(tmp_path, micro_batches=micro_batches)
    assert max(pair.differences) < 1e-6


def test_collators_that_flatten_take_a_ragged_row_for_one_sequence(tmp_path):
    """So they are no way to use it; what they return for sequences, `to_transformers` does."""
    ragged = consumers.text(tmp_path, layout="ragged")
    collator = transformers.DataCollatorWithFlattening()
    lengths = [length for row in ragged["seq_lens"] for length in row]
    starts = (collator(list(ragged))["position_ids"] == 0).sum()
    assert int(starts) == len(ragged) < len(lengths)
    assert max(consumers.flattened(tmp_path / "trained").differences) > 1e-2


@pytest.mark.parametrize(
    "options",
    [{"padding_free": False}, {"packing": True, "max_length": consumers.SEQ_LEN}],
    ids=["padded", "packed twice"],
)
def test_what_is_refused_of_a_config_would_mix_sequences_in_trl(tmp_path, options):
    with pytest.raises(ValueError, match="expected"):
        consumers.sft_trainer(tmp_path / "a", **options)
    pair = consumers.sft_trainer(tmp_path / "b", checked=False, **options)
    assert max(pair.differences) > 1e-2


def test_rows_whose_first_labels_stand_are_no_sequences_alone(tmp_path):
    """A plain Trainer needs mask_first_label: the model would predict across sequences."""
    assert max(consumers.hf_trainer_with_all_labels(tmp_path).differences) > 1e-2


def test_fixed_rows_in_trl_are_mixed(tmp_path):
    """It leaves their position_ids out, so it is given ragged ones."""
    assert max(consumers.sft_trainer_with_fixed_rows(tmp_path).differences) > 1e-2


def test_flash_attention_sees_the_sequences_of_one_row_at_a_time(tmp_path):
    """So its batches are of one row in a plain Trainer, or come from `to_transformers`."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    packed = consumers.text(tmp_path)
    row = max(packed, key=lambda row: len(row["seq_lens"]))
    positions = torch.tensor([row["position_ids"]])
    assert _is_packed_sequence(positions, batch_size=1)
    assert not _is_packed_sequence(positions.expand(2, -1), batch_size=2)
