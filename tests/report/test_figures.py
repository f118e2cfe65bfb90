"""Figures: what is drawn, the Pareto front, the same bytes for the same input."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from report import samples
from report.test_tables import table_of

pytest.importorskip("matplotlib")

from fairseq_dsq.report import figures


def drawn(paths):
    table, runs = table_of(paths)
    labels = [table.label(row) for row in table.rows]
    return {
        "loss": figures.loss_figure(runs, labels),
        "cost": figures.cost_figure(runs, labels),
        "quality": figures.pareto_figure(table, labels),
    }


@pytest.mark.parametrize(
    ("points", "higher", "front"),
    [
        ([(1, 35)], True, [0]),
        ([(1, 35), (0.1, 34), (0.5, 33)], True, [1, 0]),
        ([(1, 35), (0.1, 35)], True, [1]),
        ([(0.1, 33), (0.1, 34), (0.1, 34)], True, [1]),
        ([(1, 4.0), (0.1, 4.5), (0.5, 4.7)], False, [1, 0]),
        ([(1, 4.0), (0.5, 3.5)], False, [1]),
    ],
)
def test_the_pareto_front_holds_what_no_other_beats(points, higher, front):
    assert figures.pareto_front(points, higher) == front


def test_curves_hold_the_logged_values(tmp_path):
    text = samples.record(samples.DSQ, [7, 6, 5], [0, 0, 1], [samples.LOW] * 2 + [samples.HIGH])
    path = samples.write(tmp_path, "x", text)
    made = drawn([path])
    loss, level = made["loss"].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[7.5, 6.5, 5.5], [7, 6, 5]]
    assert list(level.lines[0].get_ydata()) == [0, 0, 1]
    arithmetic, dram = made["cost"].axes
    assert list(arithmetic.lines[0].get_ydata()) == pytest.approx([0.0318, 0.0636, 0.1684])
    assert list(dram.lines[0].get_ydata()) == pytest.approx([0.0610906, 0.1221812, 0.2113968])


def test_the_level_is_drawn_for_runs_with_several(tmp_path):
    paths = samples.write_runs(tmp_path, 3)
    _, level = drawn(paths)["loss"].axes
    assert [line.get_color() for line in level.lines] == [figures.PALETTE[1]]
    assert len(drawn([paths[0], paths[2]])["loss"].axes) == 1


def test_runs_without_costs_are_left_out(tmp_path):
    plain = samples.write(tmp_path, "plain", samples.log([6.5]), "train.log")
    made = drawn([plain])
    assert made["cost"] is None and made["quality"] is None
    made = drawn([plain, *samples.write_runs(tmp_path, 2)])
    assert [text.get_text() for text in made["cost"].legends[0].get_texts()] == [
        "Float32",
        "DSQ (BFP) [2,2,2,16] [16,4,4,16]",
    ]
    # Two of the three have test BLEU, and costs to set it against.
    assert len(made["quality"].axes[0].lines) == 3


def test_twelve_runs_look_different(tmp_path):
    made = drawn(samples.write_runs(tmp_path, 12))
    looks = {(line.get_color(), line.get_marker()) for line in made["cost"].axes[0].lines}
    assert len(looks) == 12
    for figure in made.values():
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert all(box.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)


def test_the_same_input_gives_the_same_text(tmp_path):
    paths = samples.write_runs(tmp_path, 3)
    first, second = (figures.inline_svg(drawn(paths)["loss"], "loss", "x") for _ in range(2))
    assert first == second


def test_an_inline_figure_takes_the_page_s_ink_and_has_ids_of_its_own(tmp_path):
    paths = samples.write_runs(tmp_path, 2)
    made = drawn(paths)
    texts = [figures.inline_svg(made[name], name, 'a "b" <c> & d') for name in ("loss", "cost")]
    for text in texts:
        ElementTree.fromstring(text)
        assert "currentColor" in text and figures.INK not in text and "white" not in text and "#ffffff" not in text
        assert 'role="img" aria-label="a &quot;b&quot; &lt;c> &amp; d"' in text
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= ids
    one, two = (set(re.findall(r'\bid="([^"]+)"', text)) for text in texts)
    assert len(one) > 20 and not one & two


def test_names_are_not_read_as_mathematics_nor_left_out(tmp_path):
    costs = {name: f"{value:g}" for name, value in samples.costs(samples.LOW).items()}
    text = samples.train_line(1, 5, 7, **costs)
    paths = [samples.write(tmp_path, n, text, "train.log") for n in ("_$x", "a<b>$\\frac$")]
    texts = drawn(paths)["cost"].legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["_$x", "a<b>$\\frac$"]
    figures.save(drawn(paths)["cost"], tmp_path, "cost")
    assert "a&lt;b&gt;$\\frac$" in (tmp_path / "cost.svg").read_text()
