"""The statistics over a result, its judgement and its tables."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from perf import pages, report
from perf.results import Plan, Result, Sample, Spread
from perf.thresholds import Threshold, judge


def result(*samples: tuple[str, str, int, dict[str, float]], repeats: int = 3) -> Result:
    return Result(
        started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        command="python -m perf run",
        machine={"cpus": 2},
        systems={},
        plan=Plan(systems=("vxlan", "appliance"), scenarios=("tcp1",), repeats=repeats, seconds=3),
        samples=tuple(Sample(scenario=a, system=b, repeat=c, values=d) for a, b, c, d in samples),
        memory=(),
    )


def tcp1(vxlan: list[float], appliance: list[float]) -> Result:
    pairs = (("vxlan", vxlan), ("appliance", appliance))
    return result(*(("tcp1", name, i, {"gbit_s": v}) for name, values in pairs for i, v in enumerate(values)))


def test_ratios_are_taken_inside_a_repeat():
    slower_every_time = tcp1([10.0, 4.0, 8.0], [5.0, 2.0, 4.4])
    ratio = slower_every_time.ratio("tcp1", "appliance", "gbit_s")
    assert ratio == pytest.approx(Spread(0.5, 0.5, 0.55))


def test_a_repeat_without_its_pair_is_left_out():
    half = result(
        ("tcp1", "vxlan", 0, {"gbit_s": 10.0}),
        ("tcp1", "appliance", 0, {"gbit_s": 6.0}),
        ("tcp1", "appliance", 1, {"gbit_s": 1.0}),
    )
    assert half.ratio("tcp1", "appliance", "gbit_s") == Spread(0.6, 0.6, 0.6)


def test_no_sample_is_no_spread():
    assert tcp1([], []).spread("tcp1", "vxlan", "gbit_s") is None
    assert tcp1([1.0], []).ratio("tcp1", "appliance", "gbit_s") is None


@pytest.mark.parametrize(("sense", "met"), [("at least", True), ("at most", False)])
def test_a_threshold_bounds_the_median(sense, met):
    threshold = Threshold("tcp1", "gbit_s", "ratio", sense, 0.55, "one stream")
    assert threshold.judge(tcp1([10, 10, 10], [1, 6, 9])).met is met


def test_what_was_not_measured_is_not_met():
    verdicts = judge(tcp1([10.0], [9.0]))
    assert [(it.threshold.scenario, it.met) for it in verdicts if it.met] == [("tcp1", True)]
    assert len(verdicts) > 1


def test_a_result_survives_its_file(tmp_path: Path):
    before = tcp1([10.0], [5.0])
    before.save(tmp_path / "new" / "result.json")
    assert Result.load(tmp_path / "new" / "result.json") == before


def test_the_comparison_has_a_row_for_each_metric_that_was_measured():
    grid = report.comparison(tcp1([10.0, 12.0, 14.0], [5.0, 6.0, 7.0]))
    assert grid.head == ("", "vxlan", "appliance", "appliance / vxlan")
    assert grid.rows == (("TCP, one stream, Gbit/s", "12.00 (10.00–14.00)", "6.00 (5.00–7.00)", "0.50 (0.50–0.50)"),)


def test_a_page_keeps_all_but_what_is_between_the_marks():
    begin, end = report.marks(report.RESULTS)
    page = f"before\n{begin}stale\n{end}after\n"
    written = report.inserted(page, tcp1([10.0], [5.0]))
    assert written.startswith(f"before\n{begin}`python -m perf run`, 2026-01-02 03:04 UTC")
    assert written.endswith(f"{end}after\n")
    assert "stale" not in written
    assert report.inserted(written, tcp1([10.0], [5.0])) == written


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="expected the marks"):
        report.inserted("nothing", tcp1([10.0], [5.0]))
    begin, end = report.marks("modes")
    assert "tcp" in report.inserted(begin + end, tcp1([10.0], [5.0]), "modes").lower()


def test_a_block_of_a_page_is_what_its_files_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block = pages.Block(
        Path("page.md"), "speed", (Path("some.json"),), lambda files: report.markdown(Result.load(*files))
    )
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "BLOCKS", (block,))
    tcp1([10.0], [5.0]).save(tmp_path / "some.json")
    (tmp_path / "page.md").write_text("before\n<!-- speed -->\n0.99\n<!-- end of speed -->\nafter\n")
    assert list(pages.differing()) == ["page.md: speed: expected what some.json has"]
    pages.write()
    assert list(pages.differing()) == []
    tcp1([10.0], [4.0]).save(tmp_path / "some.json")
    assert len(list(pages.differing())) == 1


def test_the_short_table_says_which_way_is_better():
    rows = report.short(result(("rr", "vxlan", 0, {"p50_us": 50.0}), ("rr", "appliance", 0, {"p50_us": 75.0})), ["rr"])
    assert "(less is better) | 50.0 | 75.0 | 1.50 |" in rows


def test_every_comparison_of_a_page_has_a_block():
    """Marks that nobody fills would keep what somebody wrote by hand."""
    named = {(it.page, it.name) for it in pages.BLOCKS}
    for page in (pages.README, pages.BENCHMARKS):
        found = re.findall(r"^<!-- (?!end of )(.*) -->$", (pages.ROOT / page).read_text(), re.MULTILINE)
        assert {(page, name) for name in found} == {it for it in named if it[0] == page}
