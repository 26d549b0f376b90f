"""`packpipe pack` by windows: parts that know no other, and the end."""

from __future__ import annotations

import json

import pytest
import windowed
from crashing import contents
from typer.testing import CliRunner

import packpipe
from packpipe.cli.main import app
from packpipe.cli.pack_windows import part_of

OPTIONS = ("--seq-len", 6, "--patch-size", 4, "--num-workers", 0, "--max-bad-fraction", 1)
OPTIONS += ("--window-rows", 15)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "train"
    windowed.write(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_parts_of_a_job_and_its_end_give_the_folder_of_one_command(source, tmp_path):
    found = run("pack", source, tmp_path / "one", *OPTIONS, "--json")
    assert found.exit_code == 0, found.output
    counts = json.loads(found.stdout.splitlines()[-1])
    assert (counts["read"], counts["rejected"]) == (60, 7)
    pattern = f"{source}/*.parquet"
    for part in ("2/3", "1/3"):
        found = run("pack", pattern, tmp_path / "parts", *OPTIONS, "--part", part)
        assert found.exit_code == 0, found.output
        assert found.stdout.endswith(f"part {part} is packed; after all parts: --finish\n")
    early = run("pack", pattern, tmp_path / "parts", *OPTIONS, "--finish")
    assert early.exit_code == 2
    assert "windows without a commit is '1 of 4, the first is 2', expected none" in early.stderr
    assert run("pack", pattern, tmp_path / "parts", *OPTIONS, "--part", "3/3").exit_code == 0
    said = run("pack", pattern, tmp_path / "parts", *OPTIONS, "--finish").stdout
    assert f"  rows                {counts['packs']}\n  bound" in said
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["rejected_by_reason"].items())
    assert f"  rejected            7\n  rejected by reason  {reasons}\n" in said
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert run("verify", tmp_path / "parts").exit_code == 0
    assert run("stats", tmp_path / "parts").exit_code == 0


def test_ray_is_asked_for_by_its_address(source, tmp_path, monkeypatch):
    addresses = []

    class Here:
        def __init__(self, address):
            addresses.append(address)

        def __enter__(self):
            return None

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(packpipe, "RayExecutor", Here, raising=False)
    found = run("pack", source, tmp_path / "out", *OPTIONS, "--ray", "auto")
    assert found.exit_code == 0, found.output
    assert addresses == ["auto"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "0/3"), "--part is '0/3', expected K/N with K in 1..N; the third of a hundred"),
        (("--part", "1/2", "--finish"), "--finish is True, expected given alone; run it once"),
        (("--finish", "--ray", "auto"), "--finish is True, expected given alone; run it once"),
        (("--split", "test"), "--split is 'test', expected none with windows; name its files"),
        (("--dry-run",), "--dry-run is True, expected none with windows"),
    ],
)
def test_what_does_not_go_together_is_refused(source, tmp_path, arguments, message):
    found = run("pack", source, tmp_path / "out", *OPTIONS, *arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_url_is_for_windows_alone(source):
    found = run("pack", source, "memory://rows", "--seq-len", 6)
    assert found.exit_code == 2
    assert "OUTPUT is 'memory://rows', expected a path without a scheme" in found.stderr


@pytest.mark.parametrize("text", ["3", "3/", "/3", "4/3", "-1/3", "a/b", "1/0", ""])
def test_a_part_is_one_of_so_many(text):
    assert part_of("3/100") == (3, 100)
    with pytest.raises(ValueError, match=r"--part is .*, expected K/N with K in"):
        part_of(text)
