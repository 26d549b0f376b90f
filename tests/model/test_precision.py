"""Precision: what runs in bfloat16, where it is refused, and that a caller's choice stands."""

import re

import numpy as np
import packed
import pytest
import torch

from packpipe.model import precision
from packpipe.model.precision import asks_for_half, has_instructions, is_half
from packpipe.model.predict import predict

IMAGES = [np.random.default_rng(n).integers(0, 256, (9, 7 + n, 3), np.uint8) for n in range(4)]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def capable(monkeypatch):
    """A CPU whose instructions are those that a test says."""
    has: set[str] = {"amx_bf16"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    return has


@pytest.mark.usefixtures("capable")
def test_auto_is_bfloat16_on_a_gpu_alone():
    assert (is_half("auto", CPU), is_half("auto", GPU)) == (False, True)
    assert (is_half("float32", CPU), is_half("float32", GPU)) == (False, False)
    assert (is_half("bfloat16", CPU), is_half("bfloat16", GPU)) == (True, True)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_without_instructions_is_refused(name, capable, caplog, monkeypatch):
    capable.clear()
    capable.update(["avx512_f", "avx512_bw", "sve"])  # which oneDNN emulates it with, slowly
    assert not has_instructions()
    message = (
        "precision is 'bfloat16', expected 'float32' on a CPU that has none of avx512_bf16, amx_bf1"
        "6, bf16; pass 'float32', or 'auto': bfloat16 is slower there"
    )
    with pytest.raises(ValueError, match=message):
        predict(packed.model_of(), IMAGES, precision="bfloat16")
    # A training is only slower: it is warned of.
    assert asks_for_half("bfloat16", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(precision, "rank_of_world", lambda: (1, 2))
        assert asks_for_half("bfloat16", CPU)
    (record,) = caplog.records
    assert (record.levelname, re.match(message, record.getMessage()) is None) == ("WARNING", False)
    capable.add(name)
    assert has_instructions()
    assert asks_for_half("bfloat16", CPU)
    assert not asks_for_half("auto", CPU)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("has", [True, False])
def test_a_torch_without_the_list_of_instructions_is_asked_for_one(has, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert has_instructions() == has
    if has:
        assert is_half("bfloat16", CPU)
    else:
        with pytest.raises(
            ValueError, match="precision is 'bfloat16', expected 'float32' on a CPU"
        ):
            is_half("bfloat16", CPU)


def test_this_machine_is_asked():
    assert has_instructions() in (True, False)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'half', expected one of 'auto', 'float32'"):
        predict(packed.model_of(), IMAGES, precision="half")


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize("pooling", ["attention", "none"])
def test_answers_in_bfloat16_are_those_of_float32_to_its_digits(pooling):
    model = packed.model_of(dtype=torch.float32, pooling=pooling)

    def answers(**options):
        found = predict(model, IMAGES, **options)
        return torch.cat([one.reshape(-1, packed.NUM_CLASSES) for one in found])

    exact = answers()
    assert torch.equal(answers(precision="auto"), exact)
    half = answers(precision="bfloat16")
    assert not torch.equal(half, exact)
    assert (half - exact).abs().max() < 5e-2 * exact.abs().max()
    # None leaves it to the caller; a precision does not.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answers().float(), half.float())
        assert torch.equal(answers(precision="float32"), exact)
