"""The report: one well-formed, self-contained page from whatever a run left behind."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from disttrain.callbacks.records.run_record import bounded
from disttrain.errors import ConfigError, DataError
from disttrain.report import labels_of, write_report
from disttrain.report.choose import caption, pictures_of_run, pictures_of_runs
from disttrain.report.draw import MAX_LINES, Line, Picture, draw, uses_log_scale
from disttrain.report.page import format_duration, format_number, format_time
from disttrain.report.read import config_differences, read_run
from disttrain.run.folder import write_run
from disttrain.run.metrics_file import MetricsFile, Series
from disttrain.system.reading import conform_run

START = 1_770_000_000.0
SCRIPT = "<script>alert('x')</script>"
STOP = "early stopping: val/loss > 0.2 & has not improved for 5 validations"
VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Collects what a test asks about, and fails on tags that do not balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources), "an image is not embedded"
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]

    def check_self_contained(self) -> None:
        names = {tag for tag, _ in self.tags}
        assert not names & {"script", "iframe", "link", "object"}, f"the page has {names}"
        for tag, attributes in self.tags:
            for name in ("src", "href", "srcset", "action"):
                value = attributes.get(name) or "data:"
                assert value.startswith("data:"), f"<{tag} {name}={value[:60]!r}> is outside the page"
            assert not any(name.startswith("on") for name in attributes), f"<{tag}> has a handler: {attributes}"


def check_png(png: bytes) -> None:
    assert png[:8] == b"\x89PNG\r\n\x1a\n", f"no PNG signature: {png[:8]!r}"
    width, height = struct.unpack(">II", png[16:24])
    assert 600 <= min(width, 2 * height) <= max(width, height) <= 2000, f"a picture of {width} x {height} pixels"
    assert png[-8:-4] == b"IEND", "the PNG is cut off"


def make_run(folder: Path, **changes: Any) -> Path:
    """A complete run of 100 steps, resumed at 40; ``changes`` replace keys of run.json, None drops them."""
    run = {
        "format": 1,
        "name": "digits",
        "status": "completed",
        "command": "fit",
        "created": START,
        "ended": START + 300,
        "stop_reason": STOP,
        "best": {"monitor": "val/loss", "mode": "min", "value": 0.2125, "step": 80},
        "result": {"test/accuracy": 0.98125, "test/loss": 0.25},
        "environment": {"torch": "2.13.0", "host": "node-7"},
        "attempts": [
            {"started": START, "ended": None, "from_step": 0, "to_step": None, "world_size": 4, "strategy": "ddp"},
            {"started": START + 200, "ended": START + 300, "from_step": 40, "to_step": 100, "world_size": 2},
        ],
        "events": [{"step": 40, "time": START + 200, "kind": "resume", "text": f"resumed {SCRIPT}"}],
    } | changes
    folder.mkdir(parents=True)
    kept = {name: value for name, value in run.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "config.yaml").write_text(f"seed: 1\noptimizer:\n  lr: 0.1 # {SCRIPT}\n", encoding="utf-8")
    file = MetricsFile(folder / "metrics.csv")
    for step in range(10, 101, 10):
        moment = START + step + (160 if step > 40 else 0)
        values = {"train/loss": 4 / step, "lr": 0.1, "samples_per_second": 100.0, "data_wait": 0.25}
        file.append(values | {"train/grad_norm": 1.0}, step=step, epoch=(step - 1) // 50, time_seconds=moment)
        if step % 20 == 0:
            file.append({"val/loss": 5 / step, "val/accuracy": 0.9}, step=step, epoch=step // 51, time_seconds=moment)
    file.append({"test/loss": 0.25}, step=100, epoch=2, time_seconds=START + 290)
    file.close()
    return folder


def test_the_page_of_a_complete_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = write_report([folder])
    assert path == folder / "report" / "report.html"
    page = Page(path)
    page.check_self_contained()
    for expected in (
        "digits", "completed", STOP, "0.98125", "0.2125 at step 80", "2 min 20 s", "25.0%", "node-7", "resume",
        "2026-02-02 02:43:20 UTC", "not recorded", "ddp", "0.1 # " + SCRIPT, "resumed " + SCRIPT,
    ):  # fmt: skip
        assert expected in page.text, f"{expected!r} is not on the page"
    assert SCRIPT not in path.read_text(), "text of the run is not escaped"
    rows = dict(zip(page.texts, page.texts[1:], strict=False))
    found = {name: rows.get(name) for name in ("steps", "epochs started", "attempts", "samples/s, mean")}
    assert found == {"steps": "100", "epochs started": "2", "attempts": "2", "samples/s, mean": "100"}
    images = page.images()
    assert len(images) == 6, f"{len(images)} pictures instead of 6"
    for png in images:
        check_png(png)
    beside = {file.read_bytes() for file in path.parent.glob("*.png")}
    assert beside == set(images), f"the PNG files beside the page differ: {sorted(path.parent.glob('*.png'))}"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    one, two = (write_report([folder], tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one == two, "two reports of one run differ"


def test_pictures_mark_best_stop_and_resumes(tmp_path: Path) -> None:
    pictures = {picture.name: picture for picture in pictures_of_run(read_run(make_run(tmp_path / "run")))}
    assert list(pictures) == [
        "loss", "accuracy", "learning-rate", "gradient-norm", "throughput", "waiting-for-data",
    ]  # fmt: skip
    loss = pictures["loss"]
    assert [line.label for line in loss.lines] == ["train/loss", "val/loss"]
    assert loss.best == (80, 0.2125, "best val/loss: 0.2125 at step 80")
    assert loss.stop == (100, "stopped at step 100")
    assert {picture.resumes for picture in pictures.values()} == {(40,)}
    assert (pictures["accuracy"].best, pictures["accuracy"].stop) == (None, None)
    assert pictures["accuracy"].lines[0].color == loss.lines[1].color, "validation changes its colour"


def test_the_loss_shows_the_life_of_the_run(tmp_path: Path) -> None:
    attempts = [
        {"started": START, "from_step": 0, "to_step": 40, "status": "preempted", "stop_reason": "preempted by SIGTERM"},
        {"started": START + 100, "from_step": 40},
    ]
    numbers = {"from_step": 80, "to_step": 50, "first_skipped": 60, "last_skipped": 62}
    events = [
        {"step": 31, "time": START, "kind": "skip", "text": "step 31: the update was left out"},
        {"step": 62, "time": START, "kind": "skip", "text": "step 62: the update was left out"},
        {"step": 80, "time": START, "kind": "rollback", "text": "going back", **numbers},
        {"step": 9, "time": START, "kind": "rollback", "text": "damaged", "to_step": "x", "last_skipped": 10**12},
    ]
    folder = make_run(tmp_path / "run", attempts=attempts, events=events)
    pictures = {picture.name: picture for picture in pictures_of_run(read_run(folder))}
    loss = pictures.pop("loss")
    assert (loss.preempted, loss.left_out, loss.rollbacks) == ((40,), (31, 60, 61, 62), ((80, 50),))
    assert {(p.preempted, p.left_out, p.rollbacks) for p in pictures.values()} == {((), (), ())}
    plain = draw(replace(loss, preempted=(), left_out=(), rollbacks=()))
    for part in ({"preempted": ()}, {"left_out": ()}, {"rollbacks": ()}):
        assert draw(replace(loss, **part)) not in (plain, draw(loss)), f"{list(part)} is not drawn"
    page = Page(write_report([folder]))
    assert page.texts[page.texts.index("updates skipped") + 1 :][0] == "4"
    assert page.texts[page.texts.index("rollbacks") + 1 :][0] == "1"


def test_a_record_is_bounded_and_its_report_counts_all(tmp_path: Path) -> None:
    """However often a run is started; and a clock that was set back gives no negative duration."""
    record: dict[str, Any] = {"status": "running", "attempts": [], "events": []}
    for number in range(300):
        attempt = {"started": 1e9 - 1000.0 * number, "ended": 1e9 - 2000.0 * number, "seconds": 2.0}
        record["attempts"].append({**attempt, "from_step": number, "to_step": number + 1})
        record["events"] += [{"step": number, "time": 1.0, "kind": kind, "text": "x"} for kind in ("start", "stop")]
        record["events"] += [{"step": 1, "time": 1.0, "kind": "rollback", "text": "x"}] if number == 0 else []
        bounded(record)
    assert len(json.dumps(record)) < 20_000
    assert bounded(conform_run({"events": [{"text": "x"}] * 501, "events_left_out": "x"}))["events_left_out"] == 1
    assert [record["attempts"][0]["from_step"], record["attempts"][-1]["from_step"]] == [0, 299]
    assert (record["attempts_left_out"], record["events_left_out"]) == (250, 500)
    assert "rollback" in {event["kind"] for event in record["events"]}, "an older event of another kind is to stay"
    write_run(tmp_path, record)
    run = read_run(tmp_path)
    assert run.wall_seconds == 600.0
    page = write_report([tmp_path]).read_text()
    assert ">300<" in page, "the attempts are to be counted with those left out"


def test_a_killed_run_has_a_report(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", status="running", ended=None, stop_reason=None, best=None, result=None, environment=None,
        attempts=[{"started": START}], events=None,
    )  # fmt: skip
    with open(folder / "metrics.csv", "ab") as file:
        file.write(b"110,2,177000")
    page = Page(write_report([folder]))
    page.check_self_contained()
    assert "no end recorded: still running, or killed" in page.text
    assert "4 min 50 s" in page.text, "the wall time does not reach to the last metric"
    assert "last logged at step 100" in str(pictures_of_run(read_run(folder))[0].stop)


def test_the_least_run_folder_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text("{}")
    page = Page(write_report([tmp_path / "bare"]))
    assert page.texts.count("bare") == 1, f"the page does not bear the folder's name: {page.texts}"
    assert "No metrics were logged." in page.texts
    assert page.images() == []


def test_keys_of_a_wrong_kind_are_passed_over(tmp_path: Path) -> None:
    odd: dict[str, Any] = {key: [3, "x", None] for key in ("best", "result", "environment", "attempts", "events")}
    folder = make_run(tmp_path / "run", created="soon", ended=math.nan, name=7, **odd)
    page = Page(write_report([folder]))
    assert "7" in page.texts


def test_texts_in_any_script_do_no_harm(tmp_path: Path) -> None:
    name = "实验 🚀 $x_1$ </title> " + "long" * 40
    folder = make_run(tmp_path / "run", name=name, stop_reason="lone surrogate \ud800")
    file = MetricsFile(folder / "metrics.csv")
    file.append({"val/точность $\\frac": 0.5, "_hidden": 1.0, "../../up": 1.0}, step=100)
    file.close()
    path = write_report([folder])
    page = Page(path)
    assert name in page.text
    pictures = {file.name for file in path.parent.glob("*.png")}
    assert len(pictures) == 9
    assert "up.png" in pictures, f"pictures: {pictures}"
    write_report([folder, make_run(tmp_path / "other", name="_other")], tmp_path / "out")


POINTS = [(step, 1 / step) for step in range(1, 1001)]


@pytest.mark.parametrize(
    "series",
    [
        pytest.param([], id="empty"),
        pytest.param([(5, 0.5)], id="one point"),
        pytest.param([(0, 0.0)], id="zero"),
        pytest.param([(step, 0.25) for step in range(50)], id="constant"),
        pytest.param([(5, 0.5), (5, 0.6)], id="one step twice"),
        pytest.param([(5, math.nan), (6, math.inf)], id="nothing finite"),
        pytest.param([(1, 1.0), (2, math.nan), (3, 1.5)], id="a hole"),
        pytest.param([(1, 1e-308), (2, 1.7e308), (3, 5e-324)], id="the edge of floating point"),
        pytest.param([(1, -1.7e308), (2, 1.7e308)], id="the edge, both signs"),
        pytest.param([*POINTS, (1001, 1e6)], id="long"),
        pytest.param([(7, 1.0)] * 1000, id="long on one step"),
        pytest.param([(10**12, 1.0), (10**15, 2.0)], id="far steps"),
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_series_can_be_drawn(series: Series, from_zero: bool) -> None:
    lines = (Line("a", series), Line("b", [(3, 2.0)], 1))
    for some in (lines[:1], lines):
        check_png(draw(Picture("p", "Title", "unit", some, (2,), (9, "stop"), (5, 0.5, "best"), from_zero, from_zero)))


def test_eight_lines_with_long_names_fit() -> None:
    lines = tuple(Line(f"{i} " + "name " * 30, POINTS, i) for i in range(MAX_LINES))
    check_png(draw(Picture("p", "T" * 300, "u" * 300, lines)))


def test_log_scale_for_more_than_two_positive_decades() -> None:
    cases: Sequence[tuple[list[float], bool]] = [
        ([1.0, 101.0], True), ([1.0, 100.0], False), ([0.0, 1000.0], False), ([-1.0, 1000.0], False),
        ([], False), ([math.inf, 1.0], False),
    ]  # fmt: skip
    for values, expected in cases:
        picture = Picture("p", "", "", (Line("a", list(enumerate(values))),))
        assert uses_log_scale(picture) is expected, f"values {values}: log scale is not {expected}"


def test_values_that_are_not_finite_are_told() -> None:
    line = Line("train/loss", [(1, 1.0), (20, math.nan), (1300, math.inf)])
    assert caption(Picture("p", "", "", (line,))) == "2 values of train/loss are nan or inf, the first at step 20."
    assert caption(Picture("p", "", "", (Line("a", [(1, 1.0)]),))) == ""


def test_more_than_eight_metrics_of_a_kind_take_several_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    file = MetricsFile(folder / "metrics.csv")
    file.append({f"val/f1/{i:02d}": 0.5 for i in range(20)}, step=100)
    file.close()
    pictures = [picture for picture in pictures_of_run(read_run(folder)) if picture.name.startswith("f1")]
    assert [len(picture.lines) for picture in pictures] == [8, 8, 4]
    assert len({picture.name for picture in pictures}) == 3, "pictures share a file name"


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name=name) for name in ("one", "two", "three")]
    (runs[1] / "config.yaml").write_text("# other\noptimizer: {lr: 0.2}\nseed: 1\nextra: [a, <b>]\n")
    path = write_report(runs, tmp_path / "out" / "deep")
    assert path == tmp_path / "out" / "deep" / "report.html"
    page = Page(path)
    page.check_self_contained()
    at = page.texts.index("optimizer.lr")
    assert page.texts[at + 1 : at + 4] == ["0.1", "0.2", "0.1"], f"found {page.texts[at : at + 4]}"
    at = page.texts.index("extra[1]")
    assert page.texts[at + 1 : at + 4] == ["-", "<b>", "-"], f"found {page.texts[at : at + 4]}"
    assert "seed" not in page.texts, "a setting that is the same is listed"
    assert len(page.images()) == 7
    for png in page.images():
        check_png(png)


def test_a_comparison_draws_eight_runs_and_lists_all(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / str(i), name=f"run {i}")) for i in range(10)]
    pictures = pictures_of_runs(runs, labels_of(runs))
    assert {len(picture.lines) for picture in pictures} == {8}
    assert pictures[0].title == "val/loss"
    page = Page(write_report([run.folder for run in runs], tmp_path / "out"))
    assert "run 9" in page.texts
    assert "The plots show the first 8 of the 10 runs." in page.texts


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name)) for name in ("one", "two")]
    assert labels_of(runs) == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_a_run_named_twice_is_one_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert write_report([folder, tmp_path / "run" / ".." / "run"]) == folder / "report" / "report.html"


def test_several_runs_need_a_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 runs") as caught:
        write_report([tmp_path / "one", tmp_path / "two"])
    assert "--out" in caught.value.hint
    with pytest.raises(ConfigError, match="no run folder"):
        write_report([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.json is missing"),
        ("{", "is not JSON"),
        ("[]", "contains a list"),
        ('{"format": 2}', "format 2"),
    ],
)
def test_a_folder_that_is_no_run_folder_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        write_report([tmp_path])
    assert str(tmp_path) in caught.value.what
    assert caught.value.hint, f"says no hint: {caught.value}"
    assert not (tmp_path / "report").exists(), "a folder was made all the same"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        write_report([tmp_path / "absent"])


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as caught:
        write_report([make_run(tmp_path / "run")], tmp_path / "file")
    assert "--out" in caught.value.hint


def test_config_differences() -> None:
    assert config_differences(["a: 1\nb: {c: [1, 2]}", "b:\n  c: [1, 3]\na: 1 # same"]) == [("b.c[1]", ["2", "3"])]
    assert config_differences(["a: {}", "a: {b: null}", ""]) == [
        ("a", ["{}", None, None]),
        ("a.b", [None, "null", None]),
    ]
    assert config_differences(["a: [1", "a: [2\nb"]) == [("line 1", ["a: [1", "a: [2"]), ("line 2", [None, "b"])]
    assert config_differences(["a: 2026-02-31", "a: 1"]) == [("line 1", ["a: 2026-02-31", "a: 1"])]


def test_formats() -> None:
    durations = {
        0.0: "0.0 s",
        59.94: "59.9 s",
        61: "1 min 1 s",
        3599.6: "1 h 0 min",
        7500: "2 h 5 min",
        93600: "1 d 2 h",
    }
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    numbers = {0.123456789: "0.123457", 12345.0: "12,345", 1e-9: "1e-09", math.inf: "inf"}
    assert {value: format_number(value) for value in numbers} == numbers
    assert format_number(math.nan) == "nan"
    assert (format_time(0), format_time(None), format_time(math.inf)) == ("1970-01-01 00:00:00 UTC", None, None)
