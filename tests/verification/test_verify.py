"""`verify` says what is wrong and where: each kind of harm is done to a folder, and found."""

import json
import re
import shutil
import sys
from dataclasses import replace
from io import BytesIO

import crashing
import datasets
import pictures
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import packpipe
from packpipe.cli import main
from packpipe.rows import files
from packpipe.rows.from_arrow import table_rows
from packpipe.rows.rejects_table import REJECTS_SCHEMA
from packpipe.rows.to_arrow import rows_table

FIRST, REJECTS = "data-00000.arrow", "rejects.arrow"


@pytest.fixture(scope="module")
def source():
    return crashing.source()


@pytest.fixture(scope="module")
def sound(source, tmp_path_factory):
    """A folder of several files and some rejects, in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("sound") / "packed"
    crashing.build(source, folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it to do harm to."""
    return shutil.copytree(sound, tmp_path / "packed")


def said(folder, *given, **options):
    return [str(problem) for problem in packpipe.verify(folder, *given, **options)]


def change_manifest(folder, change):
    found = json.loads((folder / "manifest.json").read_text())
    change(found)
    (folder / "manifest.json").write_text(json.dumps(found))


def write(folder, name, changed):
    """Write another table in place of a file, as if a build had made it."""
    record = files.write_table(folder / name, changed.schema, [changed])
    change_manifest(folder, lambda found: found["files"].update({name: record}))


def stored(folder, name):
    with pa.OSFile(str(folder / name)) as file:
        return pa.ipc.open_stream(file).read_all().combine_chunks()


def change_rows(folder, change, name=FIRST):
    """Have a file hold other rows, with the checksum of those."""
    old = stored(folder, name)
    found = table_rows(old)
    segments = {column: getattr(found, column).copy() for column in SEGMENT_COLUMNS}
    tokens = {column: getattr(found, column).copy() for column in TOKEN_COLUMNS}
    rows = replace(found, segments={**found.segments, **segments}, tokens=tokens)
    change(rows)
    write(folder, name, rows_table(rows, old.schema))


SEGMENT_COLUMNS = ("seq_lens", "grid_hw", "image_hw", "example_index")
TOKEN_COLUMNS = ("patches", "segment_ids", "coords")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_rate": 0.5, "patch_size": 2},
        {"drop_rate": 0.5, "patch_size": 2, "fit_last": "drop_rate"},
        {"patch_size": 2, "fit_last": "resolution"},
        {"resolution": packpipe.Side(packpipe.Uniform(4, 9)), "max_segments": 2},
        {"materialize": False},
        {"label_column": None},
        {"seed": 5, "epoch": 2, "num_workers": 2},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
def test_nothing_is_wrong_with_what_pack_wrote(source, tmp_path, options):
    crashing.build(source, tmp_path / "packed", **options)
    assert said(tmp_path / "packed") == []
    assert said(tmp_path / "packed", source, sample=None) == []


def test_nothing_is_wrong_with_a_folder_of_no_rows(source, tmp_path):
    crashing.build(source.select([]), tmp_path / "packed")
    assert said(tmp_path / "packed", source.select([]), sample=None) == []


def test_an_image_that_failed_in_the_middle_of_its_row_is_no_problem(source, folder):
    rejected = set(stored(folder, REJECTS)["example_index"].to_pylist())
    assert len(rejected) > 2
    assert said(folder, source, sample=None) == []


@given(data=st.data())
def test_every_byte_of_every_file_counts(sound, data):
    names = sorted(json.loads((sound / "manifest.json").read_text())["files"])
    name = data.draw(st.sampled_from(names))
    whole = (sound / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    harmed = bytearray(whole)
    harmed[at] ^= data.draw(st.integers(1, 255))
    try:
        (sound / name).write_bytes(harmed)
        found = packpipe.verify(sound)
    finally:
        (sound / name).write_bytes(whole)
    assert [problem.where for problem in found] == [name]
    assert re.fullmatch(r"xxh3_128 is [0-9a-f]{32}, expected [0-9a-f]{32}", found[0].what)


def test_a_file_that_is_cut_short_missing_or_left_over(folder):
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(whole[:-1])
    assert said(folder) == [f"{FIRST}: holds {len(whole) - 1} bytes, expected {len(whole)}"]
    (folder / FIRST).unlink()
    assert said(folder) == [f"{FIRST}: is missing"]
    (folder / FIRST).write_bytes(whole)
    (folder / REJECTS).unlink()
    assert said(folder) == [f"{REJECTS}: is missing"]
    (folder / "data-\x1bc.arrow").touch()
    (folder / "data-00003.arrow.partial").touch()
    assert said(folder)[1:] == [
        r"data-\x1bc.arrow: is not in the manifest",
        "data-00003.arrow.partial: is not in the manifest",
    ]


# What is done to the rows of the first file, and what is said of it.
ROW_HARM = {
    "a segment id": (
        lambda rows: rows.segment_ids.__setitem__((1, 0), 2),
        "row 1: segment_ids are not those of seq_lens",
    ),
    "a coordinate": (
        lambda rows: rows.coords.__setitem__((2, 0, 0), 1),
        "row 2: coords are not those of the kept tokens",
    ),
    "coordinates of all rows": (
        lambda rows: rows.coords.__setitem__((slice(0, 4), 0, 0), 5),
        "rows 0, 1, 2 and 1 more: coords are not those of the kept tokens",
    ),
    "a length": (
        lambda rows: rows.seq_lens.__setitem__(0, 0),
        "row 0: a segment with no token, or with more than its grid has",
    ),
    "a length beyond the row": (
        lambda rows: rows.seq_lens.__setitem__(0, 7),
        "row 0: seq_lens add up to more than seq_len, 6",
    ),
    "a grid": (
        lambda rows: rows.grid_hw.__setitem__(0, (9, 9)),
        "row 0: a grid or a number of tokens that its size does not give",
    ),
    "a grid of nothing": (
        lambda rows: rows.grid_hw.__setitem__(0, (0, 1)),
        "row 0: a size or a grid below 1",
    ),
    "a size": (
        lambda rows: rows.image_hw.__setitem__(0, (400, 4)),
        "row 0: a grid or a number of tokens that its size does not give",
    ),
}


@pytest.mark.parametrize(("harm", "what"), ROW_HARM.values(), ids=ROW_HARM)
def test_a_row_that_breaks_an_invariant(folder, harm, what):
    change_rows(folder, harm)
    assert f"{FIRST}, {what}" in said(folder)


HARM_BEYOND = {
    **ROW_HARM,
    "grids that are swapped": (
        lambda rows: rows.grid_hw.__setitem__(slice(0, 2), rows.grid_hw[1::-1].copy()),
        "row 0: ",
    ),
    "a grid beyond all memory": (
        lambda rows: rows.grid_hw.__setitem__(0, (32767, 32767)),
        "row 0: a grid or a number of tokens that its size does not give",
    ),
}


@pytest.mark.parametrize(("harm", "what"), HARM_BEYOND.values(), ids=HARM_BEYOND)
def test_a_row_that_breaks_an_invariant_is_not_decoded_again(source, folder, harm, what):
    change_rows(folder, harm)
    found = said(folder, source, sample=None)
    assert any(problem.startswith(f"{FIRST}, {what}") for problem in found)


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("patches", "patches are not zero in padding"),
        ("segment_ids", "segment_ids are not those of seq_lens"),
        ("coords", "coords are not those of the kept tokens"),
    ],
)
def test_padding_that_is_not_zero(folder, column, what):
    name = "data-00002.arrow"
    padded = table_rows(stored(folder, name)).segment_ids[:, -1] == 0
    row = padded.argmax()
    assert padded[row]
    change_rows(folder, lambda rows: getattr(rows, column)[row, -1:].fill(1), name)
    assert said(folder) == [f"{name}, row {row}: {what}"]


def test_a_row_of_another_file_is_named_by_its_number_there(folder):
    name = "data-00002.arrow"
    change_rows(folder, lambda rows: rows.segment_ids.__setitem__((2, 0), 9), name)
    assert said(folder) == [f"{name}, row 2: segment_ids are not those of seq_lens"]


def test_an_example_that_is_there_twice_or_nowhere(folder):
    found = stored(folder, FIRST)["example_index"].to_pylist()
    here, there = found[0][0], found[1][0]
    change_rows(folder, lambda rows: rows.example_index.__setitem__(0, there))
    assert said(folder) == [
        f"example {here}: is in no row and not in the rejects",
        f"example {there}: is in more than one row, or in a row and in the rejects",
    ]
    change_rows(folder, lambda rows: rows.example_index.__setitem__(0, 40))
    assert said(folder) == [
        f"example {here}: is in no row and not in the rejects",
        "example 40: is none of the source",
    ]


def test_an_example_that_is_in_a_row_and_rejected(folder):
    example = stored(folder, FIRST)["example_index"].to_pylist()[0][0]
    rejects = stored(folder, REJECTS)
    lost = rejects["example_index"][0].as_py()
    index = pa.array([example, *rejects["example_index"].to_pylist()[1:]])
    write(folder, REJECTS, rejects.set_column(0, REJECTS_SCHEMA.field(0), index))
    others = index.to_pylist()[1:]
    undecoded = f"undecoded names the examples {[lost, *others]}, expected {[example, *others]}"
    assert said(folder) == [
        f"example {lost}: is in no row and not in the rejects",
        f"example {example}: is in more than one row, or in a row and in the rejects",
        f"manifest.json: {undecoded}",
        "rejects.arrow: is not in the order of the examples",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("read", 41), ("packed", 1), ("rejected", 0), ("packs", 3), ("tokens", 7)),
        ("rejected_by_reason", {"undecodable": 1}),
    ],
)
def test_a_count_that_is_not_so(folder, name, value):
    expected = json.loads((folder / "manifest.json").read_text())["counts"][name]
    change_manifest(folder, lambda found: found["counts"].update({name: value}))
    problem = f"manifest.json: counts.{name} is {value!r}, expected {expected!r}"
    assert problem in said(folder)


def test_a_fill_that_is_not_so(folder):
    change_manifest(folder, lambda found: found.update(fill=0.5))
    (problem,) = said(folder)
    assert re.fullmatch(r"manifest\.json: fill is 0\.5, expected 0\.\d+", problem)


def without(name):
    return lambda found: found.pop(name)


MANIFEST_HARM = {
    "lacks config": without("config"),
    "lacks counts": without("counts"),
    "schema_version is 0, expected 1": lambda found: found.update(schema_version=0),
    "cannot be read: ValueError: an option in packing is 'colour', .*": (
        lambda found: found["config"].update(colour=3)
    ),
    "cannot be read: ValueError: seq_len is 0, .*": lambda found: found["config"].update(seq_len=0),
    r"files is \[\], expected dict": lambda found: found.update(files=[]),
    "counts is None, expected dict": lambda found: found.update(counts=None),
    r"bool_columns is \['a', 'a'\], expected each name once": (
        lambda found: found.update(bool_columns=["a", "a"])
    ),
    "seed is '0', expected int": lambda found: found.update(seed="0"),
    r"files\['data-00000.arrow'\] is {}, expected rows, bytes and checksum": (
        lambda found: found["files"].update({FIRST: {}})
    ),
    r"files\['\.\./x'\] is .*, expected rows, bytes and checksum": (
        lambda found: found["files"].update({"../x": found["files"][FIRST]})
    ),
    "says that the build is not complete; call pack again, and it continues": (
        lambda found: found.update(complete=False)
    ),
}


@pytest.mark.parametrize(("what", "harm"), MANIFEST_HARM.items(), ids=range(len(MANIFEST_HARM)))
def test_a_manifest_that_is_not_as_pack_writes_it(folder, what, harm):
    change_manifest(folder, harm)
    (problem,) = said(folder)
    assert re.fullmatch(f"manifest.json: {what}", problem)


def places_in(value, path=()):
    """Every place in a manifest, as the keys that lead there."""
    yield from ([path] if path else [])
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places_in(inner, (*path, key))


@pytest.mark.parametrize("value", [None, -5, 2**70, 1.5, float("nan"), "x", True, [], {}, [None]])
def test_whatever_a_manifest_says_it_is_a_list_of_problems(tmp_path, value):
    source, folder = crashing.source(9), tmp_path / "packed"
    crashing.build(source, folder)
    whole = json.loads((folder / "manifest.json").read_text())
    for path in places_in(whole):
        changed = json.loads(json.dumps(whole))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(changed))
        packpipe.verify(folder, source, sample=1)  # does not raise


def test_files_that_are_no_arrow_are_said_to_be_so(source, folder):
    for name in (FIRST, REJECTS):
        (folder / name).write_bytes(b"no Arrow stream")
        record = {"bytes": 15, "xxh3_128": files.checksum_of(folder / name)}
        change_manifest(folder, lambda found, at=name, to=record: found["files"][at].update(to))
    found = said(folder, source)
    assert [problem.split(": ")[:2] for problem in found[:2]] == [
        [FIRST, "cannot be read"],
        [REJECTS, "cannot be read"],
    ]


def test_rejects_that_are_other_rows_or_null_are_said_to_be_so(folder):
    rejects = stored(folder, REJECTS)
    write(folder, REJECTS, rejects.rename_columns(["row", *rejects.column_names[1:]]))
    names = "'stage', 'reason', 'exception']"
    what = f"has the columns ['row', {names}, expected ['example_index', {names}"
    assert said(folder) == [f"{REJECTS}: {what}"]
    nothing = pa.nulls(rejects.num_rows, pa.int64())
    write(folder, REJECTS, rejects.set_column(0, REJECTS_SCHEMA.field(0), nothing))
    assert said(folder) == [f"{REJECTS}: holds nulls"]


def test_a_manifest_that_is_none(folder):
    (folder / "manifest.json").write_text("{")
    (problem,) = said(folder)
    assert problem.startswith("manifest.json: cannot be read: JSONDecodeError: ")
    (folder / "manifest.json").write_bytes(b"\xff")
    (problem,) = said(folder)
    assert problem.startswith("manifest.json: cannot be read: UnicodeDecodeError: ")
    (folder / "manifest.json").write_text("[]")
    (problem,) = said(folder)
    assert problem.startswith("manifest.json: lacks schema_version, config, ")
    (folder / "manifest.json").unlink()
    assert said(folder) == ["manifest.json: is missing: the folder is none that pack wrote"]


DEEP = "[" * 100_000


def test_a_manifest_that_is_too_deep_or_a_folder_cannot_be_read(folder):
    (folder / "manifest.json").write_text(DEEP)
    (problem,) = said(folder)
    assert problem.startswith("manifest.json: cannot be read: RecursionError: ")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    (problem,) = said(folder)
    assert problem.startswith("manifest.json: cannot be read: IsADirectoryError: ")


@pytest.mark.parametrize("text", ["[[1, 2]]", "[[null, 2]]", "[]", "7"])
def test_a_job_that_is_no_object(folder, text):
    (folder / "job.json").write_text(text)
    assert said(folder) == [f"job.json: is {text.replace('null', 'None')}, expected an object"]


@pytest.mark.parametrize("how", ["too deep", "a folder", "a link that leads nowhere", "no JSON"])
def test_a_job_that_cannot_be_read(folder, how):
    job = folder / "job.json"
    if how == "a folder":
        job.mkdir()
    elif how == "a link that leads nowhere":
        job.symlink_to(folder / "nowhere")
    else:
        job.write_text(DEEP if how == "too deep" else "{")
    (problem,) = said(folder)
    assert problem.startswith("job.json: cannot be read: ")


def test_texts_of_other_codecs_are_not_compared(source, folder):
    rejects = stored(folder, REJECTS)
    place = rejects.schema.get_field_index("exception")
    words = pa.array(["other words"] * len(rejects), rejects.schema.field(place).type)
    write(folder, REJECTS, rejects.set_column(place, rejects.schema.field(place), words))
    assert re.search("rejected as .*other words", "".join(said(folder, source, sample=0)))
    change_manifest(folder, lambda found: found["codecs"].update(zlib="0.0"))
    assert "rejected as" not in "".join(said(folder, source, sample=0))


def test_a_complete_folder_without_rejects(folder):
    (folder / "rejects.arrow").unlink()
    change_manifest(folder, lambda found: found["files"].pop("rejects.arrow"))
    assert said(folder) == ["manifest.json: files lacks rejects.arrow"]
    change_manifest(folder, lambda found: found.update(files={}))
    assert "manifest.json: files lacks rejects.arrow" in said(folder)


def test_a_complete_folder_without_rows(folder):
    change_manifest(folder, lambda found: found.update(files={REJECTS: found["files"][REJECTS]}))
    assert said(folder) == [
        "manifest.json: files lacks rows, of which there is one file at least",
    ]


def test_a_state_that_opens_one_file_twice_and_another_never(folder):
    state = json.loads((folder / "state.json").read_text())
    first, second, *others = state["_data_files"]
    assert len(pa.ipc.open_stream(folder / first["filename"]).read_all()) == len(
        pa.ipc.open_stream(folder / second["filename"]).read_all()
    )
    state["_data_files"] = [first, first, *others]
    (folder / "state.json").write_text(json.dumps(state))
    (problem,) = said(folder)
    assert problem.startswith("state.json: _data_files is [{'filename': 'data-00000.arrow'}, ")


def test_features_that_are_not_those_of_the_files(folder):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["features"]["example_index"]["feature"]["dtype"] = "int32"
    path.write_text(json.dumps(info))
    (problem,) = said(folder)
    assert problem.startswith(("dataset_info.json: has the features", "state.json, dataset_info"))


MANY = "rows 0, 1, 2 and 1 more"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda old: old.drop(["coords"]), "lacks the columns coords"),
        (
            lambda old: old.set_column(3, "seq_lens", old["seq_lens"].cast(pa.list_(pa.int64()))),
            f"{MANY}: column 'seq_lens' is list<item: int64>, expected list<item: int32>",
        ),
        (
            lambda old: old.set_column(
                3,
                old.schema.field("seq_lens"),
                pa.array([None, [1], [1], [1]], pa.list_(pa.int32())),
            ),
            f"{MANY}: column 'seq_lens' holds nulls",
        ),
        (
            lambda old: old.set_column(
                3, old.schema.field("seq_lens"), pa.array([[1] * 9] * 4, pa.list_(pa.int32()))
            ),
            f"{MANY}: the segment columns hold lists of different lengths",
        ),
    ],
)
def test_columns_that_are_no_packed_rows(folder, change, what):
    old = stored(folder, FIRST)
    assert old.column_names[3] == "seq_lens"
    write(folder, FIRST, change(old))
    separator = ":" if what.startswith("lacks") else ","
    assert said(folder) == [f"{FIRST}{separator} {what}"]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_sidecars_that_datasets_cannot_open(folder, name):
    (folder / name).write_text("{")
    (problem,) = said(folder)
    assert problem.startswith("state.json, dataset_info.json: do not open: ")


def test_a_sidecar_that_leaves_a_file_out(folder):
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].pop()
    (folder / "state.json").write_text(json.dumps(state))
    (problem,) = said(folder)
    assert problem.startswith("state.json: _data_files is [{'filename': 'data-00000.arrow'}, ")


def test_pixels_that_are_not_the_images_are_found_by_decoding_again(source, folder):
    change_rows(folder, lambda rows: rows.patches.__setitem__((1, 0, 5), 0))
    change_rows(folder, lambda rows: rows.patches.__setitem__((1, 0, 6), 255))
    example = stored(folder, FIRST)["example_index"].to_pylist()[1][0]
    assert said(folder) == []
    assert said(folder, source, sample=0) == []
    (problem,) = said(folder, source, sample=None)
    assert re.fullmatch(
        rf"{FIRST}, row 1, segment 1 \(example {example}\): 2 of \d+ pixel values differ from the "
        r"image's, by \d+ at most",
        problem,
    )


def test_a_label_that_is_not_the_examples(source, folder):
    labels = [(label + 1) % 3 for label in source["label"]]
    other = source.remove_columns("label").add_column("label", labels)
    for sample in (0, None):
        found = said(folder, other, sample=sample)
        wrong = r"\S+, .*: labels are not those of the source \(example \d+: [012], expected .\)"
        assert len(found) > 3
        assert all(re.fullmatch(wrong, problem) for problem in found)


def test_a_source_that_is_another(source, folder):
    assert said(folder, source.select(range(39))) == ["dataset: holds 39 examples, expected 40"]
    assert said(folder, source.remove_columns("label")) == ["dataset: has no column 'label'"]
    words = source.remove_columns(["label", "image"]).add_column("label", ["cat"] * 40)
    words = datasets.concatenate_datasets([words, source.select_columns("image")], axis=1)
    assert said(folder, words, sample=0) == ["dataset: has labels of type string, expected int64"]
    images = [pictures.encoded_image(4, 4) for _ in range(40)]
    found = said(folder, pictures.dataset_of(images, source["label"]), sample=None)
    assert re.fullmatch(
        r"data-00000.arrow, rows .*: image_hw are not those of the source "
        r"\(example \d+: \(\d+, \d+\), expected \(4, 4\)\)",
        found[0],
    )
    assert "examples 4, 13, 22 and 1 more: is among the rejects, but good" in found
    found = said(folder, pictures.dataset_of([b"x"] * 40, source["label"]), sample=1)
    assert found[0] == (
        "examples 0, 1, 2 and 33 more: is bad (example 0 unreadable: UnidentifiedImageError: no "
        "known image format), but not among the rejects"
    )


def test_a_sample_is_drawn_without_repetition_and_the_same_every_time(source, folder):
    lost = stored(folder, REJECTS)["example_index"].to_pylist()
    images = source.with_format("arrow")[:]["image"].to_pylist()
    others = [
        image["bytes"]
        if number in lost
        else pictures.encoded_image(*source[number]["image"].size[::-1], 99)
        for number, image in enumerate(images)
    ]
    other = pictures.dataset_of(others, source["label"])
    first, second = said(folder, other, sample=5), said(folder, other, sample=5)
    assert first == second
    assert len(set(first)) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "folder is 3, expected a path; "),
        (("nowhere",), ValueError, "folder is 'nowhere', expected a folder; "),
        ((".", [1]), TypeError, "type(dataset) is 'list', expected Dataset; "),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        packpipe.verify(*arguments)


def test_a_negative_sample_is_refused():
    with pytest.raises(ValueError, match=r"^sample is -1, expected an integer in 0\.\."):
        packpipe.verify(".", sample=-1)


def ran(*arguments):
    return CliRunner().invoke(main.app, ["verify", *map(str, arguments)])


def test_the_command_says_so_if_nothing_is_wrong(source, folder, tmp_path):
    result = ran(folder)
    assert (result.exit_code, result.stdout) == (0, f"{folder}: nothing is wrong\n")
    source.save_to_disk(tmp_path / "saved")
    source.to_parquet(tmp_path / "source.parquet")
    for name in ("saved", "source.parquet"):
        result = ran(folder, "--source", tmp_path / name, "--sample", 1000)
        assert (result.exit_code, result.stderr) == (0, "")


def test_the_command_ends_with_1_and_one_line_a_problem(folder):
    change_rows(folder, lambda rows: rows.coords.__setitem__((2, 0, 0), 1))
    (folder / "data-00009.arrow").touch()
    result = ran(folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"{FIRST}, row 2: coords are not those of the kept tokens",
        "data-00009.arrow: is not in the manifest",
    ]


def test_the_command_compares_with_a_folder_of_images(tmp_path):
    images = tmp_path / "images"
    for number in range(6):
        path = images / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.encoded_image(8, 8, number))
    dataset = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    crashing.build(dataset, tmp_path / "packed")
    assert ran(tmp_path / "packed", "--source", images).exit_code == 0
    for path in images.rglob("*.png"):
        path.write_bytes(pictures.encoded_image(8, 8, 99))
    result = ran(tmp_path / "packed", "--source", images)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 6


def test_the_command_ends_with_2_if_the_call_is_wrong(folder, tmp_path):
    assert ran(tmp_path / "nowhere").exit_code == 2
    assert ran(folder, "--sample", -1).exit_code == 2
    (tmp_path / "empty").mkdir()
    result = ran(folder, "--source", tmp_path / "empty")
    assert result.exit_code == 2
    assert "empty, without any file', expected a folder of images" in result.stderr


def test_a_root_of_images_that_is_no_absolute_path(folder):
    change_manifest(folder, lambda found: found.update(image_root="photos"))
    assert said(folder) == [
        "manifest.json: image_root is 'photos', expected an absolute path",
    ]


def test_a_complete_folder_with_a_plan(folder):
    change_manifest(folder, lambda found: found.update(plan="0" * 32))
    assert said(folder) == ["manifest.json: has a plan, which a complete folder has not"]


def test_what_a_decoder_prints_stays_off_the_screen(tmp_path, capfd):
    options = {"compression": "tiff_adobe_deflate"}
    whole = pictures.encoded_image(40, 50, image_format="TIFF", **options)
    broken = bytearray(whole)
    broken[200:600] = bytes(400)
    with Image.open(BytesIO(bytes(broken))) as image, pytest.raises(OSError, match="decoder error"):
        image.load()
    assert "ZIPDecode" in capfd.readouterr().err, "libtiff prints it"
    source = pictures.dataset_of([whole, bytes(broken)])
    packpipe.pack(source, seq_len=64, output=tmp_path / "out", max_bad_fraction=1, num_workers=1)
    capfd.readouterr()  # the progress
    assert packpipe.verify(tmp_path / "out", source) == []
    assert tuple(capfd.readouterr()) == ("", "")
    sys.stderr.write("and nothing else\n")
    assert capfd.readouterr().err == "and nothing else\n"
