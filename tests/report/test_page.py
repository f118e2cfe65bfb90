"""``fairseq-dsq report``: its output, and its page in a real browser."""

import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from report import samples

from fairseq_dsq import cli

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NASTY = "a_<b>&'\"$x$ {{ 7 * 7 }} \\section #%"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of 1, 3 and 12 runs, the last with skipped input and a nasty name."""
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for count in (1, 3, 12):
        runs = samples.write_runs(folder / str(count), count)
        if count == 12:
            text = samples.record(samples.DSQ, [7, 6], [0, 1], [samples.LOW, samples.HIGH], max_epoch=5)
            runs += [samples.write(folder, NASTY, text), folder / ("nothing" * 20)]
        assert cli.main(["report", *map(str, runs), "--out", str(folder / str(count) / "out")]) == 0
        made[count] = folder / str(count) / "out" / "index.html"
    return made


def test_out_writes_tables_figures_and_a_page_twice_the_same(tmp_path, capsys):
    runs = samples.write_runs(tmp_path, 3)
    contents = []
    for _ in range(2):
        assert cli.main(["report", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [
        "cost.png", "cost.svg", "index.html", "loss.png", "loss.svg", "quality.png", "quality.svg", "table.csv",
        "table.md", "table.tex",
    ]  # fmt: skip
    out, err = capsys.readouterr()
    assert contents[0]["table.md"].decode() in out and f"wrote {tmp_path / 'out'}: index.html, table.md" in out
    assert err == ""


def test_the_page_has_a_table_of_what_is_held_where_runs_say_it(tmp_path):
    text = samples.start_line(1, **samples.DSQ) + samples.point_line(1, 10, 7.0, held=(1e6, 4e6, 2.5e6))
    for name, run in (("held", text), ("plain", samples.record(samples.DSQ, [7]))):
        path, out = samples.write(tmp_path, name, run), tmp_path / name / "out"
        assert cli.main(["report", str(path), "--out", str(out)]) == 0
        page = (out / "index.html").read_text()
        assert ("Held in memory" in page) == ("<td>9.50</td>" in page) == (name == "held")


def test_json_is_one_object_on_standard_output(tmp_path, capsys):
    runs = [*samples.write_runs(tmp_path, 2), tmp_path / "nothing"]
    assert cli.main(["report", *map(str, runs), "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [run["name"] for run in document["runs"]] == ["float32", "dsq"]
    assert len(document["runs"][1]["epochs"]) == 12
    assert err == f"fairseq-dsq report: skipped {document['skipped'][0]}\n"


def test_quality_and_baseline_are_taken_from_the_command_line(tmp_path, capsys):
    runs = [str(path) for path in samples.write_runs(tmp_path, 2)]
    given = ["--quality", "float32=90.5", "--quality", f"{runs[1]}=90", "--baseline", "dsq"]
    assert cli.main(["report", *runs, *given]) == 0
    out = capsys.readouterr().out
    assert "| quality (given) |" in out and " 90.50 (+0.50) |" in out and "the difference from dsq" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "x"], "argument --baseline: got 'x', expected one of the runs: float32"),
        (
            ["--quality", "float32=good"],
            "argument --quality: got 'float32=good', expected RUN=VALUE with a finite number",
        ),
        (["--quality", "3"], "argument --quality: got '3', expected RUN=VALUE with a finite number"),
        (["--quality", "x=3"], "argument --quality: got 'x', expected one of the runs: float32"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    (run,) = samples.write_runs(tmp_path, 1)
    assert cli.main(["report", str(run), *arguments]) == 2
    assert capsys.readouterr().err == f"fairseq-dsq report: error: {message}\n"


def test_bad_input_is_skipped_and_nothing_left_is_an_error(tmp_path, capsys):
    (run,) = samples.write_runs(tmp_path, 1)
    bad = tmp_path / "bad\n.log"
    bad.write_bytes(b"\x7fELF\0\0")
    assert cli.main(["report", str(bad), str(run), str(run)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "bad?.log: binary data, expected the folder of a run" in lines[0]
    assert lines[1].endswith("float32: given twice")
    assert cli.main(["report", str(bad)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "fairseq-dsq report: error: no run left: 1 of 1 skipped"


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    (run,) = samples.write_runs(tmp_path, 1)
    for name in ("figures", "html"):
        monkeypatch.delitem(sys.modules, f"fairseq_dsq.report.{name}", raising=False)
        monkeypatch.delattr(f"fairseq_dsq.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("matplotlib is not installed: pip install '.[report]' in the clone\n")


class _Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_is_self_contained_and_names_are_escaped(pages):
    source = pages[12].read_text()
    outline = _Outline()
    outline.feed(source)
    assert ("html", {"lang": "en"}) in outline.tags and any(tag == "title" for tag, _ in outline.tags)
    assert not any(
        tag in ("script", "link", "img", "iframe", "b") and attributes.get("href") != "data:,"
        for tag, attributes in outline.tags
    )
    references = [
        value
        for _, attributes in outline.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") or value == "data:," for value in references)
    assert not re.search(r"url\((?!#)|@import", source)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in outline.tags if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in outline.tags if tag == "svg")
    assert NASTY in outline.text
    assert "incomplete: ended after epoch 2 of 5" in outline.text
    assert "no such file or folder" in outline.text and "fairseq-dsq report " in outline.text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


MEASURE = """
const boxes = [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect());
const style = getComputedStyle(document.body);
const svg = document.querySelector("figure svg text");
return {scroll: document.documentElement.scrollWidth, width: innerWidth,
        figures: boxes.map(b => [b.width, b.height]), paper: style.backgroundColor, ink: style.color,
        figureInk: getComputedStyle(svg).fill};
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (390, 844), (1280, 800)])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_page_fits_the_screen(pages, browser, tmp_path, count, width, height, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(pages[count].as_uri())
    seen = browser.execute_script(MEASURE)
    assert seen["width"] == width and seen["scroll"] <= width
    assert len(seen["figures"]) == (2 if count == 1 else 3)
    assert all(w >= 300 and h >= 200 for w, h in seen["figures"])
    dark = scheme == "dark"
    for name in ("ink", "figureInk"):
        assert (sum(map(int, re.findall(r"\d+", seen[name])[:3])) > 382) == dark, name
    assert (sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) < 382) == dark
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert len(base64.b64decode(browser.get_screenshot_as_base64())) > 5000
