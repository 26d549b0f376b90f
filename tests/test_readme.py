"""The README's Python runs as it stands, and its commands are the ones CI calls."""

import re
from pathlib import Path

import datasets
import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_ten_lines_of_python_give_a_vector_for_every_image_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    code, *_ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    assert found["values"].shape == (len(found["example"]), 10)
    assert len(found["example"]) == int(found["batch"].present.sum()) >= 8
    assert found["packed"].num_rows == 101


def test_the_lines_of_python_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, code, *_ = blocks("python")
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    assert found["packed"].num_rows == 101
    assert (tmp_path / "packed" / "manifest.json").is_file()


def test_the_lines_of_python_that_plan_every_epoch_anew(capsys):
    _, _, code, *_ = blocks("python")
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    assert found["loader"].epoch == 0
    assert found["state"]["finished"]
    assert found["state"]["packs"] == len(found["packs"].plan(0, 0)) // 4 * 4 > 12
    assert "Side(pixels=Uniform(low=64, high=256)" in capsys.readouterr().out


def test_the_packers_lines_of_python_pack_a_million_lengths():
    *_, code = blocks("python")
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    counts = np.bincount(found["numbers"])
    assert len(counts) == len(found["plan"])
    assert counts.sum() == 1_000_000
    assert len(found["optimal"]) <= len(found["packs"])


def test_the_two_commands_come_first_and_second():
    main_job, tests = blocks("sh")
    assert main_job.rstrip().endswith("-m packpipe.demo")
    assert tests.rstrip().endswith("-m pytest --quiet")


def test_the_lines_of_python_that_train_go_on_and_predict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, _, _, code, *_ = blocks("python")
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    assert found["logits"].shape == (4, 10)
    assert len(capsys.readouterr().out.splitlines()) == 6
    exec(code, found)  # noqa: S102
    assert capsys.readouterr().out == ""


def test_the_lines_of_python_that_pack_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (code,) = (code for code in blocks("python") if "to_transformers" in code)
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    assert sum(map(sum, found["packed"]["input_ids"])) == 55
    assert found["arguments"]["cu_seq_lens_q"][-1] == found["arguments"]["input_ids"].numel()
    assert "[" in capsys.readouterr().out
