"""The README's code, and that of the pages, runs as it stands; its commands are those CI calls."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import datasets
import loading
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from packpipe import PackConfig
from packpipe.cli.main import app
from packpipe.samples import images_folder

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "pages"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
RECIPES = [DOCS / "guide.md", DOCS / "images.md"]  # whose blocks have a test each


def blocks(language, page=PAGES[0]):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own, with its own cache, as the one who reads has."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(about):
    """Run the one block of Python that names something, and return what it defined."""
    (code,) = (
        code for page in [PAGES[0], *RECIPES] for code in blocks("python", page) if about in code
    )
    found = {}
    exec(code, found)  # noqa: S102  what a reader would type
    return found


def test_every_block_is_run_by_a_test_of_its_own():
    assert [len(blocks("python", page)) for page in [PAGES[0], *RECIPES]] == [1, 6, 1]
    assert {len(blocks("sh")), len(blocks("sh", PAGES[-1]))} == {3, 0}


@pytest.mark.usefixtures("elsewhere")
def test_the_ten_lines_of_python_give_a_vector_for_every_image_of_the_rows():
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    found = ran("batch.by_example(logits)  # back")
    assert found["values"].shape == (len(found["example"]), 10)
    assert len(found["example"]) == int(found["batch"].present.sum()) >= 8
    assert found["packed"].num_rows == 101


def test_the_lines_of_python_that_lose_nothing(elsewhere):
    assert ran("packpipe.verify")["packed"].num_rows == 101
    assert (elsewhere / "packed" / "manifest.json").is_file()


@pytest.mark.usefixtures("elsewhere")
def test_the_lines_of_python_inside_map():
    found = ran("packpipe.Packer")
    assert sorted(np.concatenate(found["rows"]["example_index"])) == list(range(176))


def test_the_lines_of_python_that_plan_every_epoch_anew(capsys):
    found = ran("OverTraining")
    assert found["loader"].epoch == 0
    assert found["state"]["finished"]
    assert found["state"]["packs"] == len(found["packs"].plan(0, 0)) // 4 * 4 > 12
    assert "Side(pixels=Uniform(low=64, high=256)" in capsys.readouterr().out


def test_the_lines_of_python_that_pack_a_stream(capsys):
    found = ran("PackedStream")
    printed = capsys.readouterr().out
    assert printed.count("PackedBatch(") >= 25
    assert found["batch"].patches.shape == (4, 1024, 768)


def test_the_packers_lines_of_python_pack_a_million_lengths():
    found = ran("pack_numbers")
    counts = np.bincount(found["numbers"])
    assert len(counts) == len(found["plan"])
    assert counts.sum() == 1_000_000
    assert len(found["optimal"]) <= len(found["packs"])


@pytest.mark.usefixtures("elsewhere")
def test_the_lines_of_python_that_train_go_on_and_predict(capsys):
    assert ran("TrainConfig")["logits"].shape == (4, 10)
    assert (
        len(capsys.readouterr().out.splitlines()) == 4
    )  # a record every two steps, and one of what is saved
    ran("TrainConfig")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("elsewhere")
def test_the_lines_of_python_that_pack_tokens(capsys):
    found = ran("to_transformers")
    assert sum(map(sum, found["packed"]["input_ids"])) == 55
    assert found["arguments"]["cu_seq_lens_q"][-1] == found["arguments"]["input_ids"].numel()
    assert "[" in capsys.readouterr().out


def test_the_two_commands_come_first_and_second():
    main_job, tests, _ = blocks("sh")
    assert main_job.rstrip().endswith("-m packpipe.demo")
    assert "-m pytest --quiet" in tests.splitlines()[-1]


@pytest.mark.slow
def test_the_commands_for_one_s_own_photos(elsewhere):
    for folder in sorted(one for one in images_folder().iterdir() if one.is_dir())[:3]:
        shutil.copytree(folder, elsewhere / "photos" / folder.name)
    printed = ""
    for line in blocks("sh")[2].splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "packpipe"
        # As in a process of its own, but not every time with the imports of one.
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        printed += done.stdout
    for said in (
        "gap 0",
        "nothing is wrong",
        "report.html",
        "step 4 ",
        "times the images a second",
    ):
        assert said in printed
    for name in ("rows.png", "report.html", "run/training.png"):
        assert (elsewhere / name).is_file()


def code_and_output(page):
    """The blocks of Python of a page, each with the text that stands below it."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.M | re.S)
    assert len(found) == len(blocks("python", page))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:-1] if page not in RECIPES], ids=lambda page: page.stem
)
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # of TRL's own option
@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # of Lightning's own call
def test_a_page_s_code_prints_what_stands_below_it(page, capsys, monkeypatch):
    for code, printed in code_and_output(page):
        # A module, so that functions of the page can be sent to processes.
        module = ModuleType("page")
        monkeypatch.setitem(sys.modules, "page", module)
        exec(code, vars(module))  # noqa: S102
        assert capsys.readouterr().out == printed


# JAX and Polars have threads, after which this process should not fork any more.
CHILD = """
import without_torch
without_torch.hide()
import contextlib, io, json, sys

printed = []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.skipif(
    not all(find_spec(name) for name in ("polars", "duckdb", "jax", "grain")),
    reason="the page shows all of them",
)
def test_the_page_without_torch_prints_the_same_in_a_process_that_has_none():
    page = PAGES[-1]
    assert page.stem == "without_torch"
    found = code_and_output(page)
    assert len(found) == 7
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        input=json.dumps([code for code, _ in found]),
        env=loading.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [printed for _, printed in found]


def commands_in(page):
    """The calls of packpipe in the blocks of a page for a shell."""
    lines = "".join(blocks("(?:sh|console)", page)).splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("packpipe ")]
    return [words[1:] for words in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_commands_have_all_the_options_they_are_given(page):
    known = typer.main.get_command(app).commands
    for name, *words in commands_in(page):
        known[name].make_context(name, list(words))  # parses the words, and runs nothing


def test_the_page_of_the_first_model_has_six_commands():
    page = ROOT / "docs" / "pages" / "first_model.md"
    assert len(blocks("console", page)) == 6
    names = [name for name, *_ in commands_in(page)]
    assert names == ["train", "eval", "predict", "export", "embed"]
    assert len(blocks("text", page)) == 5


def test_links_within_the_repository_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            path = Path(os.path.normpath(page.parent / link))
            assert link.startswith("https://") or path.exists(), link
            # GitHub shows nothing behind a link to a folder.
            assert not any(folder.is_symlink() for folder in path.parents), link


def test_the_readme_is_read_in_minutes():
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 1300


def test_the_map_names_every_folder_of_the_package_and_no_other():
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "folders.md").read_text(encoding="utf-8"), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    package = ROOT / "packpipe"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders
    assert folders <= named
    assert all((package / name).is_dir() or (package / f"{name}.py").is_file() for name in named)


def test_every_option_of_a_configuration_is_listed_once():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.split("and `PackConfig`:")[1])
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(PackConfig))
