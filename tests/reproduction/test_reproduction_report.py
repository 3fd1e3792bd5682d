"""The report of made-up results with three seeds: what it tells, and that both forms tell the same."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from latte_flow_hf.reproduction.claims import judge_claims
from latte_flow_hf.reproduction.figures import SAMPLE_PROMPTS, save_figures
from latte_flow_hf.reproduction.report import Code, Figure, Heading, Paragraph, Table, compose, to_html, to_markdown


class Cells(HTMLParser):
    """Collects the text of table cells."""

    def __init__(self):
        super().__init__()
        self.cells, self.open = [], False

    def handle_starttag(self, tag, attrs):
        self.open = tag in ("td", "th") or (self.open and tag in ("strong", "code"))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


# Hashes of the starting model.
PARTS = {"backbone": "0123456789abcdef", "autoencoder": "fedcba9876543210"}


@pytest.fixture(scope="module")
def report(make_evidence, tmp_path_factory):
    """The folder with the figures, and the blocks."""
    folder, evidence = tmp_path_factory.mktemp("report"), make_evidence()
    for number, variant in enumerate(evidence.plan.settings.variants):
        run_folder = folder / "runs" / f"{variant.name}-seed-1"
        run_folder.mkdir(parents=True)
        Image.new("RGB", (64 * len(SAMPLE_PROMPTS), 64), (40 * number, 90, 60)).save(run_folder / "samples.png")
    figures = [Figure(*figure) for figure in save_figures(evidence, folder)]
    return folder, compose(evidence, judge_claims(evidence), figures, PARTS)


def test_every_figure_is_shown_once(report):
    folder, blocks = report
    shown = [block.file for block in blocks if isinstance(block, Figure)]
    expected = {"convergence", "group_size", "residual_attention", "steps_guidance", "samples"}
    assert {name.split(".")[0] for name in shown} == expected and len(shown) == 5
    labels = (folder / "convergence.svg").read_text()
    assert all(f"K = {number}" in labels for number in (1, 2, 4, 8)) and "training operations" in labels
    with Image.open(folder / "samples.png") as image:
        # A row for each network in its colour.
        assert [image.getpixel((200, 56 + 132 * row + 60))[0] for row in range(6)] == [0, 40, 80, 120, 160, 200]


def test_the_starting_model_is_named(report, make_evidence):
    """Of the smallest comparison it is not the embedded checkpoint."""
    _, blocks = report
    pipeline = make_evidence().plan.settings.pipeline
    words = f"those of `{pipeline}` (their hashes begin with `0123456789ab` and `fedcba987654`)"
    assert (
        pipeline != "tinyworld" and words in to_markdown(blocks) and "those of the embedded" not in to_markdown(blocks)
    )


def test_values_have_their_spread(report):
    _, blocks = report
    text = to_markdown(blocks)
    value = r"\d+\.\d ± \d+\.\d"
    assert re.search(rf"^\| K = 4 \| 3,200 \| 0\.00 \| {value} \| {value} \| ", text, re.MULTILINE)
    assert "mean ± standard deviation over the seeds" in text and "After equal steps, 800 for all" in text
    # 18 runs with 4 points of 66 s, and the grid.
    assert "All runs together took 80 minutes of processor time" in text


def test_the_report_says_whether_the_machine_was_busy(make_evidence):
    evidence = make_evidence()
    quiet = to_markdown(compose(evidence, judge_claims(evidence), [], PARTS))
    assert "load average of the machine was 1.2" in quiet and "waited for the processor for 1%" in quiet
    assert "Other programs ran" not in quiet
    for rounds in evidence.timing["rounds"]["1"].values():
        for item in rounds:
            item["wall"] *= 2
    busy = to_markdown(compose(evidence, judge_claims(evidence), [], PARTS))
    assert "waited for the processor for 50%" in busy and "**Other programs ran meanwhile**" in busy
    assert "remove `timing.json`" in busy


def test_both_forms_have_the_same_tables(report):
    _, blocks = report
    parser = Cells()
    parser.feed(to_html(blocks))
    tables = [block for block in blocks if isinstance(block, Table)]
    expected = [cell.replace("**", "") for table in tables for line in [table.header, *table.rows] for cell in line]
    assert [cell.replace("`", "") for cell in expected] == parser.cells
    rows = re.findall(r"^\| (?!---).*\|$", to_markdown(blocks), re.MULTILINE)
    assert len(rows) == sum(len(table.rows) + 1 for table in tables)


def test_markup_is_escaped():
    blocks = [Heading(1, "a < b"), Paragraph("`x < y` is **not** <b>"), Code(["<i>"]), Figure("a.svg", "One. Two")]
    page = to_html(blocks)
    assert "<h1>a &lt; b</h1>" in page and "<code>x &lt; y</code> is <strong>not</strong> &lt;b&gt;" in page
    assert "<pre>&lt;i&gt;</pre>" in page
    assert to_markdown(blocks).endswith("![One](a.svg)\n\nOne. Two\n")
