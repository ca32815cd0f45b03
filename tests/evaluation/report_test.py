"""The report shows what the records say, stands alone, and its pictures can be drawn."""

import re

import pytest

from gemmaqat.evaluation import plots, report
from gemmaqat.evaluation.results import results


@pytest.fixture(scope="module")
def found(tmp_path_factory, fabricated):
    workdir = tmp_path_factory.mktemp("a<b")
    fabricated.write(workdir)
    report.write(results(workdir))
    return results(workdir)


def test_terminal_table_has_a_row_per_arm_and_the_findings(found, fabricated):
    lines = report.table(found).splitlines()
    rows = [line for line in lines if line.startswith(("mild ", "severe ", "     "))]
    assert len(rows) == len(fabricated.INVENTED)
    recovery = found.record("tiny_a", "severe", "qat", 0)["metrics"]["recovery"]
    row = next(line for line in rows if re.match(r"severe +QAT", line))
    assert f"{100 * recovery:.0f} % [" in row
    assert any(line.startswith("tiny_a, severe: PTQ changes") for line in lines)


def test_markdown_table_is_rectangular(found, fabricated):
    text = (found.workdir / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + len(fabricated.INVENTED)


def test_html_needs_nothing_from_elsewhere(found):
    page = (found.workdir / "report.html").read_text()
    # Namespaces are names, not addresses that a browser loads.
    loaded = re.findall(
        r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*|url\((?!#)[^)]*|@import.*""", page
    )
    assert loaded == []
    assert "<script" not in page


def test_html_shows_every_picture_number_and_finding(found):
    page = (found.workdir / "report.html").read_text()
    assert page.count("<svg") == 4
    for record in found.records:
        assert f">{record['metrics']['answer_perplexity']:.3f}<" in page
    assert "tiny_a, severe: PTQ changes" in page


def test_html_escapes_names(found):
    page = (found.workdir / "report.html").read_text()
    assert "a&lt;b" in page and "a<b" not in page


def test_pictures_take_the_ink_of_the_page(found):
    picture = report.svg(plots.quality_against_bits(found))
    assert "currentColor" in picture and plots.INK not in picture


def test_a_missing_number_is_said_in_the_picture(found):
    for record in found.records:
        if record["recipe"] == "mild" and "recovery" in record["metrics"]:
            del record["metrics"]["recovery"]
            record["notes"]["recovery"] = "PTQ damage within noise"
    assert "PTQ damage within noise" in report.svg(plots.recovery_by_size(found))


def test_recoveries_off_the_axis_are_written_at_its_edge(found):
    found.record("tiny_a", "severe", "control", 0)["metrics"]["recovery"] = -4.1
    assert "◂ -410" in report.svg(plots.recovery_by_size(found))


@pytest.mark.parametrize("draw", [plots.loss_curves, plots.layer_errors])
def test_pictures_of_one_size_name_its_recipes(found, draw):
    picture = report.svg(draw(found, "tiny_a", 0))
    assert "mild" in picture and "severe" in picture
