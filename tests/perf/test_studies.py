"""Studies: the search for a rate, the replayed packet path, the storm, the files and the pages made of them."""

import asyncio
import subprocess
import sys

import pytest

from perf import loss, storm, study
from perf.load.tool import ROOT
from perf.study import Curve, Figure, Study
from tests.perf.test_results import tcp1

FIGURE = Figure(key="k", title="title", x="x", y="y", curves=(Curve(name="one", points=((1.0, 2.0), (10.0, 3.0))),))


@pytest.mark.parametrize("limit", [1_000, 123_456, 700_000])
def test_the_search_finds_the_rate_from_which_on_packets_are_lost(limit):
    best, trials = loss.search(lambda rate: (rate, 0.0 if rate <= limit else 5.0))
    assert limit - loss.HIGHEST / 2**loss.TRIALS <= best <= limit
    assert len(trials) == loss.TRIALS


def test_a_rate_that_the_generator_did_not_reach_does_not_count():
    best, _ = loss.search(lambda rate: (min(rate, 100_000), 0.0))
    assert best == 100_000


def test_a_study_survives_its_file_and_writes_itself_into_a_page(tmp_path):
    made = study.study("name", "about", {"what": "12 ns"}, FIGURE)
    made.save(tmp_path / "s.json")
    assert Study.load(tmp_path / "s.json") == made
    begin, end = made.marks
    page = made.inserted(f"before\n{begin}stale\n{end}after\n")
    assert "| what | 12 ns |" in page
    assert "stale" not in page
    assert made.inserted(page) == page
    with pytest.raises(ValueError, match="expected the marks"):
        made.inserted("no marks")


def test_figures_and_a_page_are_drawn(tmp_path):
    plot = pytest.importorskip("perf.plot", reason="matplotlib: expected to be installed (.[perf])")
    made = study.study("name", "a < b", {"what": "12 ns"}, FIGURE)
    paths = plot.write([made, tcp1([10.0, 12.0], [5.0, 6.0])], tmp_path)
    assert sorted(path.name for path in paths) == ["bars-tcp1.png", "bars-tcp1.svg", "index.html", "k.png", "k.svg"]
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "12 ns" in page
    assert "0.50" in page


def test_pieces_of_a_phase_that_fail_are_not_done():
    async def good():
        await asyncio.sleep(0)

    async def bad():
        raise OSError

    found = asyncio.run(storm.phase("things", [good, bad, good]))
    assert (found.wanted, found.done) == (3, 2)
    assert found.facts["things"] == "2 of 3 in the time given"


def test_a_phase_ends_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(storm, "PHASE_S", 0.05)

    async def slow():
        await asyncio.sleep(10)

    found = asyncio.run(storm.phase("things", [slow] * 100))
    assert found.done == 0
    assert found.seconds < 5


@pytest.mark.parametrize("qos", [0, 1])
def test_a_small_storm_is_weathered(qos, monkeypatch):
    monkeypatch.setattr(storm, "CHANGES", 1)
    facts = asyncio.run(storm.run(storm.Setting(nodes=6, services=12, qos=qos)))
    assert facts["nodes registered"] == "6"
    assert facts["services deployed"] == facts["instances announced"] == "12"
    assert facts["notices heard, of 1 changes by 6 nodes"] == "6"


def test_every_command_has_a_sentence():
    said = subprocess.run(
        [sys.executable, "-m", "perf", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in (
        "run",
        "list",
        "compare",
        "plot",
        "report",
        "smoke",
        "path",
        "flows",
        "stream",
        "loss",
        "latency",
        "storm",
        "calibrate",
    ):
        assert f"  {command} " in said.stdout
