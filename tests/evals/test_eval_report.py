"""The report: all that was measured, beside what others published, in one page without a script."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from eval_models import Blind, Oracle

from longwing.evals.charts import even_ticks, length_ticks
from longwing.evals.journal import Run, read_run
from longwing.evals.report import Report, make_report
from longwing.evals.run import Plan, run

ARCHITECTURE = {"architecture": "llama, 2 layers of 64", "vocab_size": 320, "rope": "default"}


@pytest.fixture
def report(text_file: Path, quality_file: Path) -> Report:
    """A dense model that knows everything and a quantised one that does not read."""
    plan = Plan(
        tasks=("topics", "lines", "passkey", "facts", "quality", "perplexity"),
        lengths=(1024, 4096),
        cases=5,
        texts=(text_file,),
        quality=quality_file,
    )
    dense = Blind("dense", 100_000, quantization=None, **ARCHITECTURE)
    packed = Blind("packed", 2048, quantization="4-bit, group 128", **ARCHITECTURE)
    dense.answer = Oracle().answer  # type: ignore[method-assign]
    return make_report([run(dense, plan), run(packed, plan)], prefix="page")


class Outline(HTMLParser):
    """Headings, tables as lists of rows, and everything that would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.fetched += [tag for name, _ in attrs if name in ("src", "href", "data", "action")]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "object", "embed") else []

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        elif {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += ("; " if self.open[-1] == "small" else "") + data


def test_page_has_a_section_for_each_task_and_its_tables(report: Report) -> None:
    page = Outline(report.html)
    assert page.headings == [
        "Evaluation at length",
        "Runs",
        "Topic retrieval",
        "Line retrieval",
        "Pass key",
        "Several facts",
        "QuALITY",
        "Perplexity",
        "Quantised and dense",
        "How to read this",
    ]
    lines = next(table for table in page.tables if table[0] == ["model", "1k", "4k"])
    assert lines[1] == ["dense", "100 %; 57–100, n = 5", "100 %; 57–100, n = 5"]
    assert lines[2] == ["packed", "0 %; 0–43, n = 5", "too long"]


def test_published_rows_stand_beside(report: Report) -> None:
    tables = Outline(report.html).tables
    published = [table for table in tables if table[0][0] == "published"]
    lines = next(table for table in published if "12,657" in table[0])
    assert lines[1:4] == [
        ["FalconLite", "38 %", "12 %", "8 %", "4 %", "–", "–"],
        ["FalconLite2", "84 %", "82 %", "66 %", "56 %", "62 %", "34 %"],
        ["MistralLite", "98 %", "92 %", "88 %", "76 %", "70 %", "60 %"],
    ]
    drawn = report.figures["lines-accuracy"]
    assert "lines: accuracy by length (grey: published)" in drawn
    assert ">FalconLite2</text>" in drawn


def test_longchats_columns_and_the_published_ones_are_one_table(longchat: Path) -> None:
    done = run(Oracle(), Plan(tasks=("lines",), longchat=longchat))
    (table,) = [t for t in Outline(make_report([done]).html).tables if t[0][0] == "model"][1:]
    assert table[0] == ["model", "200 lines; published: 3,818", "300 lines; published: 5,661"]
    assert table[3] == ["FalconLite2; published", "84 %", "82 %"]


def test_quantised_run_is_compared_with_the_dense_one_case_by_case(report: Report) -> None:
    tables = {table[0][0]: table for table in Outline(report.html).tables}
    assert tables["lines; generated"] == [
        ["lines; generated", "1k", "4k"],
        ["packed; less dense", "-100 points; 5 lost, 0 gained", "–"],
    ]
    assert tables["perplexity; text.txt"][1] == ["packed; less dense", "+0.0000 nats", "–"]
    assert tables["quality hard; quality"][0] == ["quality hard; quality", "all"]


def test_equal_results_of_two_models_are_drawn_side_by_side() -> None:
    plan = Plan(tasks=("lines",), lengths=(1024, 2048), cases=2)
    drawn = make_report([run(Oracle(name), plan) for name in "ab"]).figures["lines-accuracy"]
    (a, b), (other_a, other_b) = re.findall(
        r'<polyline points="([\d.]+),([\d.]+) [\d., ]+" fill="none" stroke="#[^"]*" '
        r'stroke-width="1.8" stroke-linejoin="round"/>',
        drawn,
    )
    assert b == other_b
    assert 2 <= float(other_a) - float(a) <= 3


def test_page_fetches_nothing(report: Report) -> None:
    assert Outline(report.html).fetched == []
    assert "http" not in report.html.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in report.html


def test_figures_are_whole_drawings_and_all_stand_in_page_and_markdown(report: Report) -> None:
    expected = {f"{task}-accuracy" for task in ("topics", "lines", "passkey", "facts")}
    expected |= {f"{task}-depth-{n}" for task in ("lines", "passkey", "facts") for n in (1, 2)}
    expected |= {"perplexity-1-1024", "perplexity-1-4096"}
    assert report.figures.keys() == expected
    for name, svg in report.figures.items():
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert svg in report.html
        assert f"](page-{name}.svg)" in report.markdown


def test_map_says_what_was_too_long(report: Report) -> None:
    assert report.figures["lines-depth-2"].count(">too long</text>") == 5
    assert "too long" not in report.figures["lines-depth-1"]


def test_markdown_has_the_tables_of_the_page(report: Report) -> None:
    assert "| model | 1k | 4k |\n| --- | --- | --- |\n" in report.markdown
    assert r"| packed | 0 % (0–43, n = 5) | too long |" in report.markdown
    rows_there = [line for line in report.markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows_there}) <= 8


def test_report_can_be_drawn_again_from_the_record_alone(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    done = run(Oracle(), Plan(tasks=("facts",), lengths=(1024,), cases=3), out)
    assert make_report([read_run(out)]) == make_report([done])


def test_words_of_a_record_stay_words(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|[x](y)"
    report = make_report([run(Oracle(name), Plan(tasks=("lines",), lengths=(1024,), cases=2))])
    assert "<script" not in report.html
    assert "&lt;script&gt;" in report.html
    assert r"\<script\>alert(1)\</script\>\|\[x\](y)" in report.markdown


def test_runs_of_one_name_are_told_apart() -> None:
    done = run(Oracle(), Plan(tasks=("lines",), lengths=(1024,), cases=2))
    names = [row[0] for row in Outline(make_report([done, done, done]).html).tables[1][1:]]
    assert names == ["oracle", "oracle (2)", "oracle (3)"]


def test_runs_of_one_model_that_measured_different_things_are_one_row() -> None:
    model = Oracle(context_len=2048)
    parts = [
        run(model, Plan(tasks=("lines", "facts"), lengths=lengths, cases=1))
        for lengths in ((1024, 4096), (2048, 4096))
    ]
    runs, lines, *_ = Outline(make_report(parts).html).tables
    assert lines[1][1:] == ["100 %; 21–100, n = 1"] * 2 + ["too long"]
    assert [row[0] for row in runs[1:]] == ["oracle"]
    assert runs[1][5] == "4"


def test_time_of_cases_that_overlap_is_called_added_up() -> None:
    done = run(Oracle(), Plan(tasks=("lines",), lengths=(1024,), cases=4))
    cases = [{**record, "seconds": 30.0} for record in done.records]
    made = make_report([Run(header=done.header, records=cases)])
    head, row = Outline(made.html).tables[0]
    assert dict(zip(head, row, strict=True))["time; added up"] == "2 min"
    assert "| time (added up) |" in made.markdown


def test_run_without_a_finished_case_still_makes_a_page() -> None:
    begun = Run(header={"kind": "run", "model": {"name": "x"}}, records=())
    assert Outline(make_report([begun]).html).headings[-1] == "How to read this"


def test_ticks_are_round_and_hold_the_range() -> None:
    assert [label for _, label in even_ticks(2.13, 3.4)] == ["2", "2.5", "3", "3.5"]
    assert [label for _, label in length_ticks([1500, 12_657])] == ["1k", "2k", "4k", "8k", "16k"]
    for low, high in ((2.0, 2.0), (0.0, 0.001), (1.7, 300.0)):
        ticks = even_ticks(low, high)
        assert ticks[0][0] <= low <= high <= ticks[-1][0] + 1e-9
        assert 2 <= len(ticks) <= 9


def test_markdown_and_page_agree_in_every_number(report: Report) -> None:
    shown = re.findall(
        r"\d+ %", re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", report.html, flags=re.S)
    )
    assert sorted(shown) == sorted(re.findall(r"\d+ %", report.markdown))
