"""Decoding processes, left alone, or hung, crashed and killed by what they decode."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import traps
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import children, is_stopped, of_session, wait_until
from test_fill import FAILURE, FILES, PIXELS, RULES, WIDTH, boxed, cases, order_of

from packpipe.images import pool
from packpipe.images.fill import Failure, ImageTask, fill_row
from packpipe.images.pool import DecoderError, Decoders, RowTask

SEQ_LEN = 30
NUM_ROWS = 6
CRASHES = {
    "a fault": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "an abort": "import os; os.abort()",
    "an exit": "import os; os._exit(7)",
    "an exit by exception": "raise SystemExit(7)",
}
LOOPS = "while True: pass"


@pytest.fixture
def trapped(monkeypatch):
    assert traps.START != pool._START
    monkeypatch.setattr(pool, "_START", traps.START)


def running(code: str, image: int = 0, example: int = 0) -> ImageTask:
    """An image that has Python run where it is decoded, and is sound then."""
    return order_of(image, traps.running(code, FILES[image]), example=example)


def decoding(num_workers: int = 1, seconds: float = 20, **options: float) -> Decoders:
    found = Decoders(num_workers, NUM_ROWS, (SEQ_LEN, WIDTH), RULES, seconds, **options)
    found.rows[...] = 77
    return found


def filled(by: Decoders, *rows: list[ImageTask]) -> list[list[Failure | None]]:
    """Fill rows in one task."""
    return by.submit([RowTask(row, orders) for row, orders in enumerate(rows)]).result(300)


def row_of(orders: list[ImageTask]) -> bytes:
    """What a row holds that is filled here."""
    out = np.empty((SEQ_LEN, WIDTH), np.uint8)
    fill_row(orders, out, RULES)
    return out.tobytes()


def sound(*images: int) -> list[ImageTask]:
    return [order_of(image) for image in images]


@pytest.fixture(scope="module", params=[1, 3])
def some_decoders(request) -> Iterator[Decoders]:
    with decoding(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for number, file in enumerate(FILES):
        (folder / f"{number} é.png").write_bytes(file)
    return [str(folder / f"{number} é.png") for number in range(len(FILES))]


@given(data=st.data())
def test_rows_filled_in_processes_are_the_bytes_of_rows_filled_here(some_decoders, paths, data):
    num_rows = data.draw(st.integers(1, NUM_ROWS))
    rows = [
        [case.order for case in data.draw(st.lists(cases(paths), max_size=5))]
        for _ in range(num_rows)
    ]
    places = data.draw(st.permutations(range(NUM_ROWS)))[:num_rows]
    size = data.draw(st.integers(1, num_rows))
    orders = [RowTask(place, row) for place, row in zip(places, rows, strict=True)]
    some_decoders.rows[...] = 77
    tasks = [
        some_decoders.submit(orders[start : start + size]) for start in range(0, num_rows, size)
    ]
    outcomes = [row for task in tasks for row in task.result(300)]

    wanted = np.full((NUM_ROWS, SEQ_LEN, WIDTH), 77, np.uint8)
    assert outcomes == [fill_row(row, wanted[place], RULES) for place, row in orders]
    assert some_decoders.rows.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "pixels",
    [
        PIXELS[0][..., 0],
        PIXELS[0][..., 0] > 100,
        PIXELS[0][..., :1].astype(np.uint16) * 256,
        PIXELS[0].astype(">u2"),
        PIXELS[0][..., :2],
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2, 9), np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_arrays_of_any_type_and_shape_travel(some_decoders, pixels):
    orders = [order_of(1), order_of(0, pixels), boxed(3), order_of(2)]
    wanted = np.empty((SEQ_LEN, WIDTH), np.uint8)
    assert filled(some_decoders, orders) == [fill_row(orders, wanted, RULES)]
    assert some_decoders.rows[0].tobytes() == wanted.tobytes()


def test_more_tasks_than_processes_and_more_bytes_than_a_socket_holds(some_decoders):
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    orders = [ImageTask(0, noise, (99, 99), (5, 6), None)]
    tasks = [[RowTask(row, orders * 1) for row in range(NUM_ROWS)] for _ in range(12)]
    assert sum(noise.nbytes for task in tasks for _ in task) > 2e6
    results = [some_decoders.submit(task) for task in tasks]
    assert [result.result(300) for result in results] == [[[None]] * NUM_ROWS] * 12
    assert {row.tobytes() for row in some_decoders.rows} == {row_of(orders)}


@pytest.mark.usefixtures("trapped")
def test_an_image_that_loops_for_ever_is_too_slow_and_its_neighbours_are_there():
    rows = [sound(0, 1), [*sound(2), running(LOOPS, image=1), *sound(3)], sound(4)]
    with decoding(seconds=1) as found:
        outcomes = filled(found, *rows)
        assert filled(found, sound(3)) == [[None]], "another process is there"
    why = Failure("too slow", "not decoded within 1 s of processor time")
    assert outcomes == [[None, None], [None, why, None], [None]]
    assert [row.tobytes() for row in found.rows[1:3]] == [row_of(sound(2, 3)), row_of(sound(4))]


@pytest.mark.usefixtures("trapped")
def test_time_is_an_images_own_and_the_processors_so_that_waiting_is_not_slow():
    works = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    orders = [running(works), running("import time; time.sleep(1.5)"), *[running(works)] * 2]
    with decoding(seconds=1) as found:
        assert filled(found, orders, orders[:1]) == [[None] * 4, [None]]
        assert filled(found, orders[:2]) == [[None] * 2]


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.usefixtures("trapped")
def test_an_image_that_crashes_its_decoder_twice_is_left_out_and_its_neighbours_are_there(
    tmp_path, crash
):
    tried = tmp_path / "tried"
    crashes = running(f"open({str(tried)!r}, 'a').write('x')\n{CRASHES[crash]}", image=3)
    with decoding() as found:
        outcomes = filled(found, sound(0), [*sound(1), crashes, *sound(2)], sound(4))
    assert tried.read_text() == "xx"
    ((middle,),) = [row[1:2] for row in outcomes if len(row) == 3]
    assert middle.reason == "crashed"
    assert re.fullmatch(r"decoding it ended the process with (-11|-6|7)", middle.exception)
    assert outcomes == [[None], [None, middle, None], [None]]
    assert [row.tobytes() for row in found.rows[:3]] == [
        *(row_of(sound(0)), row_of(sound(1, 2)), row_of(sound(4))),
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("trapped")
def test_a_process_that_is_killed_twice_at_an_image_is_no_fault_of_the_image(number):
    killed = running(f"import os, signal; os.kill(os.getpid(), {int(number)})", image=3)
    message = (
        f"a decoding process was killed twice at example {killed.example}, by signal {number:d}; "
        "is there enough memory?"
    )
    with decoding() as found, pytest.raises(DecoderError, match=f"^{re.escape(message)}$"):
        filled(found, sound(0), [*sound(1), killed])


@pytest.mark.usefixtures("trapped")
def test_several_images_that_hang_and_crash_are_each_left_out():
    crashes = running(CRASHES["a fault"])
    row = [crashes, *sound(1), running(LOOPS), order_of(2, FAILURE), crashes, *sound(3), crashes]
    with decoding(seconds=1) as found:
        (outcomes,) = filled(found, row)
    reasons = [outcome and outcome.reason for outcome in outcomes]
    assert reasons == ["crashed", None, "too slow", "missing", "crashed", None, "crashed"]
    assert found.rows[0].tobytes() == row_of(sound(1, 3))


def until(mark: Path) -> str:
    """Code that waits for a file."""
    return f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)"


def once(mark: Path, code: str) -> str:
    """Code that runs the first time only."""
    return f"import os\nif not os.path.exists({str(mark)!r}):\n open({str(mark)!r}, 'w')\n {code}"


@pytest.mark.usefixtures("trapped")
def test_an_image_whose_decoder_ends_once_is_there(tmp_path):
    crashes = [
        running(once(tmp_path / str(number), "os.abort()"), image=number) for number in range(3)
    ]
    with decoding() as found:
        assert filled(found, crashes) == [[None] * 3]
    assert found.rows[0].tobytes() == row_of(sound(0, 1, 2))


@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "idle"])
@pytest.mark.usefixtures("trapped")
def test_a_process_that_somebody_kills_costs_no_image(tmp_path, at_work):
    pid, written = tmp_path / "pid", tmp_path / "written"
    says = f"open({str(written)!r}, 'w').write(str(os.getpid()))"
    says += f"; os.rename({str(written)!r}, {str(pid)!r})"
    waits = once(tmp_path / "ran", says + "; import time; time.sleep(60)" * at_work)
    rows = [sound(0, 1), [*sound(4), running(waits, image=2), *sound(3)]]
    with decoding() as found:
        task = found.submit([RowTask(row, orders) for row, orders in enumerate(rows)])
        wait_until(pid.exists)
        if not at_work:
            assert task.result(300) == [[None] * 2, [None] * 3]
            found.rows[...] = 77
        os.kill(int(pid.read_text()), signal.SIGKILL)
        if not at_work:
            task = found.submit([RowTask(row, orders) for row, orders in enumerate(rows)])
        assert task.result(300) == [[None] * 2, [None] * 3]
    assert [row.tobytes() for row in found.rows[:2]] == [
        row_of(sound(0, 1)),
        row_of(sound(4, 2, 3)),
    ]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "raise OSError(24, 'Too many open files')",
            OSError,
            "[Errno 24] example 41: Too many open files",
        ),
        ("raise OSError(12, 'Cannot allocate')", OSError, "[Errno 12] example 41: Cannot allocate"),
        ("raise MemoryError('all of it')", MemoryError, "example 41: all of it"),
        ("raise MemoryError", MemoryError, "example 41: not enough to decode it in"),
    ],
)
@pytest.mark.usefixtures("trapped")
def test_a_fault_of_the_machine_is_raised_here_and_no_failure(code, error, message):
    with decoding() as found:
        with pytest.raises(error) as caught:
            filled(found, [*sound(0), running(code, example=41), *sound(1)])
        assert filled(found, sound(1)) == [[None]], "the process goes on"
    assert type(caught.value) is error
    assert str(caught.value) == message
    if error is OSError:
        assert caught.value.errno == int(re.findall(r"\d+", message)[0])


def stopping(mark: Path) -> str:
    """Code that waits for a process to be stopped for good, and says how often it was run."""
    return f"import os, signal; open({str(mark)!r}, 'a').write('x')\nos.kill(os.getpid(), {STOP})"


STOP = int(signal.SIGSTOP)
SOON = 0.2


@pytest.fixture
def only_stopped(monkeypatch):
    """Have processes stand still that are stopped, and no other, however busy the machine is."""

    def run_time(pid: int) -> object:
        return "stopped" if is_stopped(pid) else object()

    monkeypatch.setattr(pool, "run_time", run_time)


@pytest.mark.usefixtures("trapped", "only_stopped")
def test_an_image_at_which_a_process_stops_twice_is_left_out_and_its_neighbours_are_there(tmp_path):
    tried = tmp_path / "tried"
    rows = [sound(0), [*sound(1), running(stopping(tried), image=3), *sound(2)], sound(4)]
    with decoding(still_seconds=SOON) as found:
        outcomes = filled(found, *rows)
        assert filled(found, sound(3)) == [[None]], "another process is there"
    assert tried.read_text() == "xx"
    what = "the process that decodes it made no progress at all within 0.2 s, twice"
    assert outcomes == [[None], [None, Failure("standstill", what), None], [None]]
    wanted = [row_of(sound(3)), row_of(sound(1, 2)), row_of(sound(4))]
    assert [row.tobytes() for row in found.rows[:3]] == wanted


@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "idle"])
@pytest.mark.usefixtures("trapped", "only_stopped")
def test_a_process_that_somebody_stops_costs_no_image(tmp_path, at_work):
    pid = tmp_path / "pid"
    stops = once(tmp_path / "ran", f"open({str(pid)!r}, 'w').write(str(os.getpid()))")
    if at_work:
        stops = once(tmp_path / "ran", f"os.kill(os.getpid(), {STOP})")
    rows = [sound(0, 1), [*sound(4), running(stops, image=2), *sound(3)]]
    with decoding(still_seconds=SOON) as found:
        if not at_work:
            filled(found, *rows)
            os.kill(int(pid.read_text()), signal.SIGSTOP)
            wait_until(lambda: is_stopped(int(pid.read_text())))
        assert filled(found, *rows) == [[None] * 2, [None] * 3]
    assert [row.tobytes() for row in found.rows[:2]] == [
        row_of(sound(0, 1)),
        row_of(sound(4, 2, 3)),
    ]


def test_a_process_is_waited_for_but_not_while_an_image_is_read_here(monkeypatch):
    seen = []

    def read_image() -> bytes:
        wait_until(lambda: found._progress() == {})
        seen.append("read")
        return FILES[0]

    with decoding() as found:
        (process,) = found._processes
        wait = process._waiting
        monkeypatch.setattr(process, "_waiting", lambda: seen.append("waits") or wait())
        assert filled(found, [order_of(0, read_image)] * 2) == [[None] * 2]
        assert found._progress() == {}
    assert seen == ["waits", "read", "waits", "read", "waits", "waits"]


@pytest.mark.usefixtures("only_stopped")
def test_a_process_that_stops_before_its_first_image_is_an_error_after_a_few_attempts(monkeypatch):
    start = f"import os; os.kill(os.getpid(), {STOP})"
    monkeypatch.setattr(pool, "_START", start)
    message = "a decoding process does not start: it made no progress at all within 0.2 s"
    with leaving_nothing(), decoding(still_seconds=SOON) as found:
        with pytest.raises(DecoderError, match=f"^{re.escape(message)}$"):
            filled(found, sound(0))
        del found


def test_nothing_is_imported_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    with decoding() as found:
        assert filled(found, sound(1)) == [[None]]


@pytest.mark.parametrize("code", ["{}['a key']", "assert False", "raise RuntimeError('a key')"])
@pytest.mark.usefixtures("trapped")
def test_a_defect_is_raised_with_its_traceback(code):
    with decoding() as found, pytest.raises(DecoderError) as caught:
        filled(found, [running(code)])
    assert str(caught.value).startswith("Traceback (most recent call last):\n")
    assert "worker.py" in str(caught.value)
    assert "key" in str(caught.value) or "AssertionError" in str(caught.value)


def test_a_size_that_is_not_the_planned_one_names_the_example_and_both_sizes(some_decoders):
    changed = order_of(1, FILES[2], example=41)
    message = (
        "example 41: image_hw is (2, 8), expected (4, 6) as planned; "
        "plan again (stored rows: into another folder), the source has changed"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        filled(some_decoders, sound(0), [*sound(1), changed])


def test_an_image_of_pillow_cannot_go_to_another_process(some_decoders):
    image = Image.fromarray(PIXELS[0])
    with pytest.raises(TypeError, match=r"^an image of type Image cannot go to another process$"):
        filled(some_decoders, [order_of(0, image)])
    assert filled(some_decoders, sound(0)) == [[None]]


@pytest.mark.parametrize("status", [3, 0])
def test_a_process_that_does_not_start_is_an_error_after_a_few_attempts(
    monkeypatch, tmp_path, status
):
    tried = tmp_path / "tried"
    start = f"open({str(tried)!r}, 'a').write('x'); raise SystemExit({status})"
    monkeypatch.setattr(pool, "_START", start)
    message = f"^a decoding process does not start: it ended with {status}$"
    with decoding() as found, pytest.raises(DecoderError, match=message):
        filled(found, sound(0))
    assert tried.read_text() == "xxx"


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fail if there are children or open files afterwards that were not there before."""

    def found() -> tuple[list[str], list[int]]:
        gc.collect()
        return sorted(os.listdir("/proc/self/fd")), sorted(children())

    subprocess._cleanup()  # ended children of other tests, which the next Popen would wait for
    before = found()
    yield
    assert found() == before


def test_no_python_to_start_is_an_error_that_leaves_nothing_open(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with leaving_nothing(), pytest.raises(FileNotFoundError):
        decoding()


def test_a_path_object_that_python_puts_up_with_on_its_path_is_no_matter(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("somewhere")])
    with decoding() as found:
        assert filled(found, sound(0)) == [[None]]


@pytest.mark.usefixtures("trapped")
def test_what_a_process_prints_is_not_printed_here(capfd):
    prints = """
import os, sys
print("noise", flush=True)
print("noise", file=sys.stderr, flush=True)
os.write(1, b"noise")
os.write(2, b"noise")
os.system("echo noise; echo noise >&2")
"""
    with decoding() as found:
        assert filled(found, [running(prints), running(CRASHES["an abort"])])[0][0] is None
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("restarted", [False, True], ids=["as started", "started again"])
@pytest.mark.usefixtures("trapped")
def test_closed_decoders_leave_no_child_and_no_descriptor(num_workers, restarted):
    crashing = [[*sound(0), running(CRASHES["a fault"])]] * num_workers if restarted else []
    orders = [*crashing, *[sound(0)] * (NUM_ROWS - len(crashing))]
    with leaving_nothing():
        with decoding(num_workers) as found:
            assert len(children()) >= num_workers
            tasks = [found.submit([RowTask(number, row)]) for number, row in enumerate(orders)]
            assert all(task.result(300)[0][0] is None for task in tasks)
        rows = [row.tobytes() for row in found.rows]
        del found
    assert rows == [row_of(sound(0))] * NUM_ROWS, "rows outlive the processes"


def test_a_stream_that_another_thread_has_closed_is_an_end_like_others():
    with decoding() as found:
        (process, *_) = found._processes
        process._stream.close()
        process._stopped = True
        with pytest.raises(DecoderError, match=r"^the decoding processes were stopped$"):
            pool._fill(process, [RowTask(0, sound(0))])


@pytest.mark.usefixtures("trapped")
def test_decoders_that_are_closed_at_work_end_at_once(tmp_path):
    mark = tmp_path / "at work"
    loops = running(f"open({str(mark)!r}, 'w')\n{LOOPS}")
    with leaving_nothing():
        with decoding(seconds=600) as found:
            tasks = [found.submit([RowTask(0, [loops])]), found.submit([RowTask(1, sound(0))])]
            wait_until(mark.exists)
            started = time.monotonic()
        assert time.monotonic() - started < 120, "of the 600 s that it may take"
        with pytest.raises(DecoderError, match=r"^the decoding processes were stopped$"):
            tasks[0].result(0)
        with pytest.raises(CancelledError):
            tasks[1].result(0)
        del found, tasks


@pytest.mark.usefixtures("trapped")
def test_a_process_that_is_being_started_again_while_decoders_are_closed_ends_too(monkeypatch):
    popen, starting, go_on = subprocess.Popen, threading.Event(), threading.Event()
    started: list[subprocess.Popen[bytes]] = []

    def later(*args, **options):
        starting.set()
        go_on.wait(300)
        started.append(popen(*args, **options))
        return started[-1]

    with decoding() as found:
        monkeypatch.setattr(pool.subprocess, "Popen", later)
        task = found.submit([RowTask(0, [running(CRASHES["a fault"])])])
        assert starting.wait(300)
        threading.Timer(0.3, go_on.set).start()
    alive = [process.pid for process in started if process.pid in children()]
    for process in started:  # or they would outlive the test
        process.kill()
        process.wait()
    assert alive == []
    assert task.done()


@pytest.mark.usefixtures("trapped")
def test_images_are_read_as_they_are_decoded_and_not_held(tmp_path):
    mark, read = tmp_path / "mark", []

    def image(number: int) -> bytes:
        read.append(number)
        return traps.running(until(mark), FILES[0]) if number == 0 else FILES[0] + bytes(10**6)

    orders = [order_of(0, partial(image, number)) for number in range(12)]
    with decoding() as found:
        task = found.submit([RowTask(0, orders[:6]), RowTask(1, orders[6:])])
        wait_until(lambda: 1 in read)
        time.sleep(0.3)
        assert read == [0, 1]  # a socket holds less than one
        mark.touch()
        task.result(300)
    assert read == list(range(12))


def test_an_image_that_cannot_be_read_for_no_known_reason_is_raised_and_disturbs_no_other():
    def unreadable() -> bytes:
        raise RuntimeError("no such thing")

    with decoding() as found:
        for _ in range(2):
            task = found.submit([RowTask(0, [*sound(0), order_of(1, unreadable), *sound(2)])])
            with pytest.raises(RuntimeError, match="no such thing"):
                task.result(300)
            assert filled(found, sound(1)) == [[None]]
            assert found.rows[0].tobytes() == row_of(sound(1))


def test_what_follows_an_image_of_another_size_is_taken_off_the_line():
    large = FILES[1] + bytes(10**6)
    assert PIXELS[0].shape != PIXELS[1].shape
    with decoding() as found:
        for _ in range(2):
            task = found.submit([RowTask(row, [order_of(0, large)] * 3) for row in range(2)])
            with pytest.raises(ValueError, match="example 0: "):
                task.result(300)
            before = children()
            assert filled(found, sound(1)) == [[None]]
            assert children() == before, "it was started again"


@contextmanager
def busy(
    tmp_path: Path, code: str, start: str = "", *, deaf: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Another process, in a session of its own, whose two decoders run some code each."""
    arguments = [str(tmp_path), code, start, deaf]
    process = subprocess.Popen(
        [sys.executable, traps.__file__, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "starting\n"
        yield process
    finally:
        process.kill()  # first, or it would start the others again
        for pid in of_session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("code", [LOOPS, "import time; time.sleep(600)"], ids=["loop", "sleep"])
def test_ctrl_c_leaves_no_process_and_one_complaint(tmp_path, code):
    with busy(tmp_path, code) as process:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        assert len(of_session(process.pid)) == 3
        os.killpg(process.pid, signal.SIGINT)
        said, complaint = process.communicate(timeout=120)
        assert of_session(process.pid) == []
    assert process.returncode == -signal.SIGINT
    assert said == ""
    assert re.findall("^KeyboardInterrupt.*", complaint, re.MULTILINE) == ["KeyboardInterrupt"]


def test_ctrl_c_while_processes_start_is_for_the_one_that_starts_them_to_answer(tmp_path):
    begun, go = tmp_path / "begun", tmp_path / "go"
    begun.mkdir()
    start = f"import os; open(f'{begun}/{{os.getpid()}}', 'w')\n{until(go)}\n"
    with busy(tmp_path, "pass", start, deaf=True) as process:
        wait_until(lambda: len(list(begun.iterdir())) == 2)
        assert len(of_session(process.pid)) == 3
        os.killpg(process.pid, signal.SIGINT)
        go.touch()
        said, complaint = process.communicate(timeout=120)
        assert of_session(process.pid) == []
    assert (process.returncode, said, complaint) == (0, "done\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_decoders_end_when_the_process_that_they_work_for_is_killed(tmp_path, number):
    go = tmp_path / "go"
    with busy(tmp_path, until(go)) as process:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        assert len(of_session(process.pid)) == 3
        os.kill(process.pid, number)
        assert process.wait(120) == -number
        go.touch()
        wait_until(lambda: of_session(process.pid) == [])
        said, complaint = process.communicate()
    assert (said, complaint) == ("", "")


def test_undisturbed_it_does_its_work(tmp_path):
    go = tmp_path / "go"
    with busy(tmp_path, until(go)) as process:
        go.touch()
        said, complaint = process.communicate(timeout=120)
    assert (process.returncode, said, complaint) == (0, "done\n", "")


HEAVY = {"numba", "pyarrow", "scipy", "datasets", "torch", "pandas", "matplotlib"}


def loaded_with(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    return set(run([sys.executable, "-c", code]).stdout.split())


def test_a_decoding_process_loads_nothing_heavy():
    loaded = loaded_with("packpipe.images.worker")
    assert {"packpipe.images.worker", "packpipe.images.fill", "PIL", "numpy"} <= loaded
    assert loaded & HEAVY == set()


def test_something_heavy_would_be_noticed():
    assert {"numba", "pyarrow"} <= loaded_with("packpipe.rows.fill_ahead") & HEAVY
