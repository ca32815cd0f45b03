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


def test_terminal_tables_have_their_rows_and_the_findings(found, fabricated):
    lines = report.table(found).splitlines()
    rows = [line for line in lines if line.startswith(("mild ", "severe ", "float ", "     "))]
    arms, recovering, recipes = len(fabricated.INVENTED), 2 * 3, 1 + 2
    assert len(rows) == arms + recovering + recipes
    recovery = found.record("tiny_a", "severe", "qat", 0)["metrics"]["recovery"]
    assert any(f"{100 * recovery:.0f} % [" in r for r in rows if re.match(r"severe +QAT", r))
    assert any(line.startswith("tiny_a, severe: PTQ changes") for line in lines)


def test_markdown_tables_are_rectangular(found, fabricated):
    text = (found.workdir / "report.md").read_text()
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    assert [len(b) for b in blocks] == [2 + len(fabricated.INVENTED), 2 + 6, 2 + 3]
    for rows in blocks:
        assert len({line.count("|") for line in rows}) == 1


def test_only_recoveries_with_drift_in_them_are_marked(found):
    text = report.markdown(found)
    marked = {line.split("|")[2].strip() for line in text.splitlines() if " † |" in line}
    assert marked == {"control (float, then PTQ)", "QAT"}


def test_storage_says_what_is_quantized_and_how_far(found):
    assert "| severe | 50% | 2.50 | 6.60 | 0.0066 |" in report.markdown(found)


def test_figures_are_files_of_their_own(found, tmp_path):
    written = report.write_figures(found, tmp_path / "images", formats=("svg",))
    names = [
        "quality_against_bits",
        "recovery_by_size",
        "loss_curves_tiny_a",
        "layer_errors_tiny_a",
    ]
    assert [path.name for path in written] == [f"{name}.svg" for name in names]
    for path in written:
        text = path.read_text()
        assert "<svg" in text and "<text" not in text and "currentColor" not in text


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


def test_quality_is_drawn_over_the_bits_of_quantized_weights(found):
    picture = report.svg(plots.quality_against_bits(found))
    assert "bits of a quantized weight" in picture
    assert "2.50 bits" in picture and "6.60 bits" not in picture


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
