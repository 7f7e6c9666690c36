"""Figures, both pages, and the command: what stands in them, and what a hostile record cannot do to them."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import record_of, scaling_sweep, write_sweep
from wanexp.record import OUTCOMES, Record
from wanexp.report import command, figures_memory, figures_speed
from wanexp.report.cells import Cell, Run, Sweep
from wanexp.report.collect import make_cells, read_sweep
from wanexp.report.compose import compose, draw, single_run
from wanexp.report.drawing import MAX_ROWS, Drawn
from wanexp.report.page import escape_markdown, to_html, to_markdown

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
EVIL = "<script>alert(1)</script> ![x](http://evil/x.png) | `code` *bold* </td> &amp; <img src=http://evil/y> $\\frac$"


def cells_of(records: list[Record]) -> list[Cell]:
    return make_cells([Run(record) for record in records])


def texts_of(drawn: Drawn | None) -> str:
    """Everything written in a figure: matplotlib keeps each text as a comment beside its outlines."""
    assert drawn is not None
    return " ".join(re.findall(r"<!-- (.*?) -->", drawn.svg.decode()))


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds to draw."""
    monkeypatch.setattr("wanexp.report.compose.draw", lambda *_: [])


@pytest.fixture(scope="module")
def every_figure() -> list[Drawn]:
    return draw(cells_of(scaling_sweep(3)), None)


def small_sweep(**changes: Any) -> list[Record]:
    """Six cells with three runs each."""
    modes = [
        ("none", 1),
        ("data_parallel", 2),
        *(("context_parallel", n) for n in (2, 4)),
        ("fsdp", 2),
        ("fsdp", 4),
    ]
    return [record_of(mode, count, repeat=repeat, **changes) for repeat in range(3) for mode, count in modes]


def test_a_sweep_over_gpus_has_every_figure(every_figure: list[Drawn]) -> None:
    names = [drawn.name for drawn in every_figure]
    assert names == [
        "scaling_latency",
        "scaling_throughput",
        "times_latency",
        "times_throughput",
        "peaks",
        "tradeoff_latency",
        "tradeoff_throughput",
        "memory_over_time",
        "prediction",
        "energy",
    ]
    for drawn in every_figure:
        assert drawn.png.startswith(b"\x89PNG")
        ElementTree.fromstring(drawn.svg)
        assert drawn.alt and drawn.title


def page_of(records: list[Record]) -> str:
    return to_markdown(compose(Sweep("s", cells_of(records))).blocks)


@pytest.mark.usefixtures("without_figures")
def test_the_tables_mark_what_is_not_credible_and_have_no_exponents() -> None:
    records = [record_of("none", 1), record_of("cfg_parallel", 2), record_of("context_parallel", 2)]
    for record, steps in zip(
        records, ([18263.0, 90.0, 18263.0, 90.0], [173.0] * 4, [500.0] * 4), strict=True
    ):
        record.samples["step_ms"] = steps
        record.metrics["load/read_gib"] = 0.0
    page = page_of(records)
    assert "(not credible)" in page and "An efficiency above 110% is noise" in page
    assert not re.search(r"\de[+-]\d", page)
    assert "| made in 5.30 s |" in page and "load, s" not in page
    assert figures_speed.scaling(cells_of(records), "latency") is None, "noise alone makes no figure"
    records.append(record_of("tensor_parallel", 2))
    records[0].samples["step_ms"] = [600.0] * 4
    records[3].samples["step_ms"] = [90.0, 18263.0, 90.0, 18263.0]
    text = texts_of(figures_speed.scaling(cells_of(records), "latency"))
    assert "left out as too noisy: 1 cell; above 110% not credible" in text
    assert "credible" not in page_of([record_of("none", 1), record_of("cfg_parallel", 2)])
    html = to_html("s", compose(Sweep("s", cells_of(records))).blocks)
    assert "<td class=n>1 run x 4</td>" in html, "not wrapped"
    records[0].metrics["load/read_gib"] = 26.6
    assert "| loaded in 5.30 s |" in page_of(records)


@pytest.mark.usefixtures("without_figures")
def test_the_tables_say_over_how_many_blocks_an_answer_was_compared() -> None:
    records = [record_of(mode, 2) for mode in ("data_parallel", "cfg_parallel", "context_parallel")]
    for record, compared in zip(records, (4.0, 4.0, 40.0), strict=True):
        record.requested["model"]["architecture"] = {"num_layers": 40}
        record.metrics["parity/num_blocks"] = compared
    records[1].metrics["parity/same_kernels"] = 0.0
    page = page_of([*records, record_of("tensor_parallel", 2)])
    assert "| bit-equal, 4 of 40 blocks |" in page
    assert "| 0.003, 4 of 40 blocks, other kernels |" in page
    assert page.count("| 0.003 |") == 2, "over all blocks, and of a record that does not say"


@pytest.mark.usefixtures("without_figures")
def test_the_page_says_which_baseline_is_missing() -> None:
    modes = [("data_parallel", 2), ("block_distribution", 2), ("cfg_parallel", 2), ("block_distribution", 4)]
    page = page_of([record_of(mode, count) for mode, count in modes])
    assert "sample a step without a speed-up have no baseline: no run of mode none finished." in page
    (row,) = [line for line in page.splitlines() if line.startswith("| block_distribution, 2 GPUs | fin")]
    assert "baseline" in row, "of the one on four GPUs"
    assert "No run of mode none finished, so the base is the cell with the fewest devices that did." in page
    (row,) = [line for line in page.splitlines() if line.startswith("| cfg_parallel, 2 GPUs | fin")]
    assert "x |" not in row and "baseline" not in row


@pytest.mark.usefixtures("without_figures")
def test_the_headline_of_several_settings_names_each() -> None:
    small = {"name": "480p", "width": 832, "height": 480, "num_frames": 33}
    one = [record_of(mode, count) for mode, count in (("none", 1), ("cfg_parallel", 2))]
    both = [
        *one,
        *(record_of(mode, count, video=small) for mode, count in (("none", 1), ("cfg_parallel", 2))),
    ]
    (first, *_), named = (compose(Sweep("s", cells_of(records))).headline for records in (one, both))
    assert first[0] == "Fastest" and first[1].startswith("cfg_parallel, 2 GPUs: ")
    assert [term for term, _ in named] == [f"Fastest, wan2.1_t2v_14b 480p 832x480x{n}" for n in (81, 33)]
    assert all(said.startswith("cfg_parallel, 2 GPUs: ") for _, said in named)


def test_figures_are_the_same_twice() -> None:
    first, second = (figures_speed.times(cells_of(small_sweep()), "latency") for _ in range(2))
    assert first is not None and first == second


@pytest.mark.parametrize("number", [figures_speed.MAX_NAMED, figures_speed.MAX_NAMED + 1])
def test_of_many_series_the_legend_names_modes_alone(number: int) -> None:
    records = [record_of("none", 1)] + [
        record_of("tensor_parallel", 2, attention=f"kernel_{index}", slowdown=1 + index / 100)
        for index in range(number)
    ]
    drawn = figures_speed.scaling(cells_of(records), "latency")
    assert drawn is not None
    is_crowded = number > figures_speed.MAX_NAMED
    assert texts_of(drawn).count("attention=kernel_") == (0 if is_crowded else number)
    lines = drawn.svg.decode().count("stroke-opacity: 0.5")
    assert lines == 2 * (1 if is_crowded else number), "the best of each mode, on both axes"


def test_a_base_of_several_samples_is_drawn_once_and_not_as_one_sample() -> None:
    records = [record_of("none", 1, workload={"name": "denoise", "batch_size": size}) for size in (None, 2)]
    records[1].effective["batch_size"] = 2
    cells = cells_of([*records, record_of("data_parallel", 2), record_of("tensor_parallel", 2)])
    assert "batch_size=2" not in texts_of(figures_speed.times(cells, "latency"))
    assert texts_of(figures_speed.times(cells, "throughput")).count("none, 1 GPU, batch_size=2") == 1
    throughput = figures_memory.tradeoff(cells, "throughput")
    assert throughput is not None and texts_of(throughput).count("batch_size=2") <= 1


def test_latency_and_throughput_modes_share_no_axis() -> None:
    cells = cells_of(scaling_sweep(1))
    for name in ("scaling", "times", "tradeoff"):
        module = figures_memory if name == "tradeoff" else figures_speed
        latency, throughput = (
            texts_of(getattr(module, name)(cells, kind)) for kind in ("latency", "throughput")
        )
        assert "context_parallel" in latency and "data_parallel" not in latency
        assert "data_parallel" in throughput and "context_parallel" not in throughput


def test_subtitles_say_hardware_settings_and_n(every_figure: list[Drawn]) -> None:
    for drawn in every_figure:
        text = texts_of(drawn)
        assert "MADE-UP H200" in text and "wan2.1_t2v_14b 480p, bf16" in text
        assert "n = 3 runs x 5 steps a cell" in text


def test_out_of_memory_is_drawn() -> None:
    cells = cells_of(scaling_sweep(1))
    for drawn in (
        figures_speed.scaling(cells, "throughput"),
        figures_speed.times(cells, "throughput"),
        figures_memory.peaks(cells),
        figures_memory.tradeoff(cells, "throughput"),
    ):
        assert "out of memory" in texts_of(drawn)


def test_no_price_no_cost() -> None:
    assert "USD" in texts_of(figures_speed.energy(cells_of(scaling_sweep(1))))
    assert "USD" not in texts_of(figures_speed.energy(cells_of(scaling_sweep(1, usd_per_gpu_hour=None))))


def test_many_rows_are_cut_and_said() -> None:
    records = [record_of("context_parallel", 2, seed=i, attention=f"kernel{i}") for i in range(MAX_ROWS + 5)]
    assert f"first {MAX_ROWS} of {MAX_ROWS + 5} cells" in texts_of(
        figures_speed.times(cells_of(records), "latency")
    )
    page = (SCRIPT.parents[1] / "docs" / "reviewing.md").read_text(encoding="utf-8")
    assert f"Figures show at most {MAX_ROWS} rows" in page


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_any_outcome_makes_a_page(outcome: str) -> None:
    records = [Record(run_id="r", name="n", started="", requested={}, outcome=outcome)]
    records.append(record_of("none", 1, outcome=outcome))
    report = compose(Sweep("s", cells_of(records)))
    assert "<h1>Sweep s</h1>" in to_html(report.title, report.blocks)
    assert to_markdown(report.blocks).startswith("# Sweep s")


class Loads(HTMLParser):
    """Collects tags, and every address that a browser would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    records = scaling_sweep(1)
    evil = record_of("fsdp", 2, repeat=1, attention=EVIL)
    evil.outcome, evil.message, evil.warnings = "failed", EVIL, [EVIL]
    evil.overrides, evil.environment["host"]["name"] = [EVIL], EVIL
    report = compose(Sweep(EVIL, cells_of([*records, evil])))
    page = to_html(report.title, report.blocks)
    parser = Loads()
    parser.feed(page)
    assert not parser.tags & {"script", "link", "iframe", "object", "embed", "a", "form", "base", "svg"}
    assert parser.addresses and all(a.startswith("data:image/svg+xml;base64,") for a in parser.addresses)
    assert "Content-Security-Policy" in page and "default-src &#x27;none" not in page
    assert "&lt;script&gt;alert(1)" in page
    markdown = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", to_markdown(report.blocks))  # in code nothing acts
    assert "<script" not in markdown and "<img" not in markdown
    assert not re.search(r"(?<!\\)\]\(http", markdown)


def test_markdown_escapes() -> None:
    assert escape_markdown("a|b *c* [d](e) <f> `g`\nh") == "a\\|b \\*c\\* \\[d\\](e) &lt;f&gt; \\`g\\` h"
    assert escape_markdown("block_distribution _x_") == "block_distribution \\_x\\_"


def test_the_command_writes_both_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "s", scaling_sweep(1))
    (folder / "figures").mkdir()
    (folder / "report.md").write_text("![Of a report before](figures/old.png)\n")
    for name in ("old.png", "old.svg", "mine.png"):
        (folder / "figures" / name).touch()
    assert command.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Fastest: context_parallel, 8 GPUs") and "report.html" in said
    page, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    for text in (page, markdown):
        assert text.index("Fastest") < text.index("speed-up")  # the answer comes first
        assert "19 of 22 cells finished, 1 oom, 1 skipped, 1 waiting" in text
        assert "write gpus=\\[0,1\\]" in text or "write gpus=[0,1]" in text
        assert "NVLink" in text and "2.11.0+cu130" in text and "MADE-UP CPU" in text
        assert "rerun.py" in text
    assert not list((folder / "figures").glob("old.*"))
    assert (folder / "figures" / "mine.png").exists()
    links = re.findall(r"\]\((figures/.*?\.png)\)", markdown)
    assert len(links) == 10 and all((folder / link).is_file() for link in links)
    assert page.count("<img") == 10


@pytest.mark.usefixtures("without_figures")
def test_the_runs_stand_beside_the_report_as_data(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", scaling_sweep(1))
    assert command.main([str(folder)]) == 0
    found = json.loads((folder / "runs.json").read_text())
    records = {tuple(record.overrides): record for record in scaling_sweep(1)}
    assert len(found["runs"]) == 22 and found["sweep"] == "s"
    for run in found["runs"]:
        record = records.get(tuple(run["overrides"]))
        if record is None:
            assert run["outcome"] in ("skipped", "waiting") and "metrics" not in run
        else:
            assert (run["outcome"], run["metrics"]) == (record.outcome, record.metrics)
            assert [device["name"] for device in run["devices"]] == [
                device["name"] for device in record.effective["devices"]
            ]


@pytest.mark.usefixtures("without_figures")
def test_cells_that_never_ran_are_repeated_by_their_overrides(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", scaling_sweep(1))
    assert command.main([str(folder)]) == 0
    line = "python -m wanexp parallelism=cfg_parallel 'gpus=[0,1,2,3]' model=wan2.1_t2v_14b"
    assert line in (folder / "report.md").read_text()


def test_mode_none_is_repeated_on_the_one_gpu_that_it_ran_on() -> None:
    record = record_of("none", 1, gpus=[1, 0])
    record.overrides = ["parallelism=none", "gpus=[1,0]"]
    assert "python -m wanexp parallelism=none 'gpus=[1]'  #" in page_of([record])


def test_the_command_of_one_cell_has_nothing_of_the_sweep_but_its_file() -> None:
    """What a sweep alone may ask for ends a single run; the file of a sweep may choose the model (mlperf)."""
    grid = ["sweep_name=x", "gpus=[0]", "repeats=3", "resume=true", "hydra.sweeper.max_batch_size=4"]
    assert single_run(grid) == ["gpus=[0]"]
    assert single_run(["+sweep=mlperf", *grid]) == ["+sweep=mlperf", "gpus=[0]", "hydra.mode=RUN"]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("name", "suffix", "expected"),
    [
        ("s", "-3f9a1c", "resume=true"),
        (None, "-3f9a1c", "sweep_name=2026-11-26_20-00-00 resume=true"),
        (None, "", "sweep_name=2026-11-26_20-00-00 resume=true"),  # of an older version
    ],
)
def test_a_sweep_that_is_not_whole_says_what_runs_the_rest(
    name: str | None, suffix: str, expected: str, tmp_path: Path
) -> None:
    folder = write_sweep(tmp_path / "s", small_sweep())
    document = {
        "state": "interrupted",
        "name": name,
        "sweep_id": "2026-11-26_20-00-00" + suffix,
        "command": ["python", "-m", "wanexp", "-m", "gpus=[0],[0,1]", "resume=true"],
    }
    sweep = replace(read_sweep(folder), document=document)
    text = to_markdown(compose(sweep).blocks, figures="figures")
    assert f"python -m wanexp -m 'gpus=[0],[0,1]' {expected}\n" in text


@pytest.mark.usefixtures("without_figures")
def test_against_an_older_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_sweep(tmp_path / "old", small_sweep())
    same = write_sweep(tmp_path / "same", small_sweep(seed=1))
    slow = write_sweep(tmp_path / "slow", small_sweep(seed=1, slowdown=1.2))
    assert command.main([str(same), "--against", str(old)]) == 0
    assert re.search(r"Against old: no regression \(\d same", capsys.readouterr().out)
    assert command.main([str(slow), "--against", str(old)]) == 1
    assert capsys.readouterr().out.count("Regression: ") == 6
    assert "slower: +2" in (slow / "report.md").read_text()
    other = write_sweep(tmp_path / "other", [record_of("none", 1, num_steps=9, checkpoint="wan")])
    capsys.readouterr()
    assert command.main([str(other), "--against", str(old)]) == 0
    said = capsys.readouterr().out
    assert "Against old: nothing to compare" in said, "no good news"
    differing = "the same settings (workload.num_steps was 5, is 9; checkpoint was null, is wan)"
    assert differing in said
    assert differing in (other / "report.md").read_text().replace("\\_", "_")


@pytest.mark.usefixtures("without_figures")
def test_against_says_that_the_machine_changed(tmp_path: Path) -> None:
    old, now = small_sweep(), small_sweep()
    for record in old:
        record.environment["driver"] = "535.0"
    folders = [write_sweep(tmp_path / name, records) for name, records in (("old", old), ("now", now))]
    assert command.main([str(folders[1]), "--against", str(folders[0])]) == 0
    assert "driver: 535.0 before, 580.0 now" in (folders[1] / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no folder"),
        (["s", "--baseline", "x"], "no cell is called"),
        (["s", "--against", "y"], "y is no folder here, and there is no MLflow store"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_sweep(tmp_path / "s", [record_of("none", 1)])
    assert command.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(said, line)


def test_what_is_no_finding_does_not_end_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 says that a cell got worse."""
    folder = write_sweep(tmp_path / "s", [record_of("none", 1)])
    for error in (OSError("no space left"), ImportError("no mlflow"), RuntimeError("ours")):

        def fails(*_: object, error: Exception = error) -> list[Path]:
            raise error

        monkeypatch.setattr(command, "write_report", fails)
        assert command.main([str(folder)]) == 2
    without = "import sys; sys.modules['matplotlib'] = None; import runpy; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", without, SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: matplotlib")


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--against" in done.stdout
    assert os.access(SCRIPT, os.X_OK)
