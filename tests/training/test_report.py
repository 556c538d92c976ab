from __future__ import annotations

import errno
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from parley.data.doctor.findings import Diagnosis, Finding, Lengths
from parley.data.summary import DataSummary, RowGroup
from parley.errors import RunError
from parley.training import report as report_module
from parley.training.formatting import Row
from parley.training.report import (
    Answer,
    MaskExample,
    Report,
    Scores,
    StepFigures,
    Turn,
    data_rows,
    lead,
    render_html,
    score_changes,
    write_report,
)

VOID = {"meta", "link", "br", "path"}
EVIL = """</div></script><script>alert("x")</script><img src=http://evil.example/x.png onerror='a()'>&amp;"""


class Page(HTMLParser):
    """Tags with attributes, visible text, and an error where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not {"script", "style"} & set(self._open) else ""

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_every_section_is_there(pirate_report: Report) -> None:
    page = Page(render_html(pirate_report))
    assert page.ids == [
        "headline", "answers", "curves", "resources", "data", "examples", "settings", "versions", "next",
    ]  # fmt: skip
    assert page.count("svg") == 5
    words = " ".join(page.text.split())
    for said in (
        "1% → 98%",
        "97% → 95%",
        "3.12 → 1.33",
        "1,000 steps",
        "2.6% of the memory",
        "80.4% of the whole run",
        "99.5% of the rows",
        "dropped: longer than 2048 tokens 61",
        "parley chat runs/pirate",
        "lora_alpha: 16",
        "2.13.0+cu130",
        "Arr, 'tis th' Tope",
        "Tope, arrr",
    ):
        assert said in words, said


def test_the_page_fetches_nothing(pirate_report: Report) -> None:
    pirate_report.answers.append(Answer(question="See https://example.com/?", after="<img src='https://x.y/z.png'>"))
    html = render_html(pirate_report)
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "video", "audio", "base"}, tag
        assert attrs.get("href", "data:,") == "data:,"
        assert not {"src", "srcset", "data", "action", "style-src", "xlink:href"} & set(attrs)
    style = "".join(re.findall(r"<style>.*?</style>", html, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_text_from_models_and_data_is_escaped_everywhere() -> None:
    report = Report(
        title=EVIL,
        created=EVIL,
        model=EVIL,
        data=EVIL,
        answers=[
            Answer(question=EVIL, before=EVIL, after=EVIL, reference=EVIL),
            Answer(question=[Turn(role=EVIL, content=EVIL, tool_calls=[{"name": EVIL}])]),
        ],
        data_summary={EVIL: EVIL, "dropped": {EVIL: 3}},
        data_lines=[EVIL],
        examples=[MaskExample(origin=EVIL, pieces=[(EVIL, True), (EVIL, False)])],
        settings_yaml=EVIL,
        versions={EVIL: EVIL},
        next_commands=[EVIL],
        notes=[EVIL],
    )
    page = Page(render_html(report))
    assert page.count("img") == 0
    assert page.count("script") == 1
    assert page.text.count(EVIL) >= 18


def test_marks_are_exactly_the_trained_pieces(pirate_report: Report) -> None:
    pieces = [("<|user|>\n", False), ("Ahoy ", True), (" & ", False), ("there<|eot|>", True)]
    pirate_report.examples = [MaskExample(origin="row 1", pieces=pieces)]
    html = render_html(pirate_report).split('<article class="card example">')[1].split("</article>")[0]
    assert re.findall(r"<mark>(.*?)</mark>", html) == ["Ahoy ", "there&lt;|eot|&gt;"]
    assert ">&lt;|user|&gt;\n<mark>" in html  # and white space is the row's own


def test_an_empty_report_is_a_page() -> None:
    page = Page(render_html(Report(title="Nothing yet")))
    assert page.ids == ["headline", "curves"]
    assert "No step was logged." in page.text


@pytest.mark.parametrize("count", [1, 2, 39, 40, 100_000])
def test_logs_of_every_length(count: int) -> None:
    steps = [StepFigures(step=i + 1, loss=2.0 + i % 7, learning_rate=1e-4) for i in range(count)]
    html = render_html(Report(title="t", steps=steps))
    assert Page(html).count("svg") == 2
    assert len(html) < 300_000


def test_nan_losses_are_said_and_do_not_reach_the_drawing() -> None:
    losses = [2.0, math.nan, 1.5, math.inf, None]
    html = render_html(Report(title="t", steps=[StepFigures(step=i, loss=loss) for i, loss in enumerate(losses)]))
    assert "2 not finite" in html
    drawing = html.split("<figure")[1].split("</figure>")[0]
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", drawing)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, None, []),
        (Scores(style_rate=0.0), Scores(style_rate=0.956), [("Style", "0%", "95.6%", (0.0, 95.6))]),
        (None, Scores(accuracy=0.9), [("Accuracy", "", "90%", None)]),
        (Scores(heldout_loss=3.0), None, [("Held-out loss", "3", "", None)]),
        (Scores(style_rate=0.5), Scores(style_rate=0.25), [("Style", "50%", "25%", (50.0, 25.0))]),
        (Scores(heldout_loss=0.0), Scores(heldout_loss=0.0), [("Held-out loss", "0", "0", None)]),
        (Scores(heldout_loss=2.0), Scores(heldout_loss=math.nan), [("Held-out loss", "2", "not finite", None)]),
    ],
)
def test_headline_scores(before: Scores | None, after: Scores | None, expected: list[Any]) -> None:
    changes = score_changes(Report(title="t", before=before, after=after))
    assert [change[:4] for change in changes] == expected
    Page(render_html(Report(title="t", before=before, after=after)))


def test_data_are_named_as_people_do_and_zeros_are_left_out() -> None:
    summary = DataSummary(source="x.jsonl", rows=200, kept=150, heldout=50, unread=["id"])
    summary.skip("line 3", "no JSON")
    rows = data_rows(summary.model_dump(mode="json"))
    assert rows == [
        Row("source", "x.jsonl"),
        Row("rows", "200"),
        Row("kept to train on", "150", 75.0, "rows"),
        Row("held out", "50"),
        Row("bad rows: count", "1"),
        Row("bad rows: first", "line 3"),
        Row("bad error", "no JSON"),
        Row("columns not used", "id"),
    ]


def test_lead_says_what_is_known(pirate_report: Report) -> None:
    said = ["1,000 steps", "1,921,344 tokens", "2 min 22 s", "NVIDIA H200", "3.61 GiB at the peak"]
    assert lead(pirate_report) == said
    assert lead(Report(title="t")) == []
    assert lead(Report(title="t", steps=[StepFigures(step=1)])) == ["1 step"]


def test_heldout_losses_are_drawn_from_the_scores_and_between(pirate_report: Report) -> None:
    loss, *smaller = report_module.charts(pirate_report)
    assert [dot.x for dot in loss.dots] == [0, 25, 50, 75, 100]
    assert all(chart.dots == [] for chart in smaller)


def test_written_figures_read_back_as_they_were(tmp_path: Path, pirate_report: Report) -> None:
    pirate_report.steps[3].loss = math.nan
    pirate_report.steps[4].grad_norm = math.inf
    pirate_report.answers[0].after = "مرحبا 🏴\u200d☠️"
    path = write_report(tmp_path, pirate_report)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render_html(pirate_report)
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
    text = (tmp_path / "report.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["steps"][3]["loss"] == "NaN"
    again = Report.model_validate_json(text)
    assert math.isnan(again.steps[3].loss or 0)
    assert again.steps[4].grad_norm == math.inf
    assert again.answers == pirate_report.answers
    assert again.model_dump_json() == pirate_report.model_dump_json()


def test_half_a_character_does_not_lose_the_report(tmp_path: Path) -> None:
    lone = json.loads('"ahoy \\ud83d"')
    write_report(tmp_path, Report(title="t", answers=[Answer(question=lone, after=lone)]))
    assert "ahoy ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, Report(title="old"))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_module.os, "replace", full)
    with pytest.raises(RunError, match=r"report\.json: cannot be written \(No space left on device\); change"):
        write_report(tmp_path, Report(title="new"))
    assert Report.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8")).title == "old"
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"No such file or directory") as caught:
        write_report(tmp_path / "gone", Report(title="t"))
    assert "\n" not in str(caught.value)


def test_data_checks_are_a_section_with_every_finding_and_its_cure(tmp_path: Path) -> None:
    findings = [
        Finding(
            check="duplicate",
            severity="warning",
            what="rows that repeat an earlier one",
            rows=RowGroup(count=1234, first=["rows.jsonl line 7"]),
            share=0.25,
            example=EVIL,
            cure="data.drop=[duplicate] leaves them out",
        ),
        Finding(
            check="nul", severity="note", what="rows with NUL", rows=RowGroup(count=1, first=["row 2"]), share=1e-5
        ),
    ]
    lengths = Lengths(
        count=2, total=50, smallest=10, largest=40, percentiles={"p5": 10, "p50": 10, "p95": 40, "p99": 40}
    )
    diagnosis = Diagnosis(source="rows.jsonl", format="text", rows=5000, characters=lengths, findings=findings)
    report = Report(title="run", diagnosis=diagnosis)
    page = Page(render_html(report))
    assert "data-checks" in page.ids
    text = " ".join(page.text.split())
    for shown in ("1,234", "25.0%", "<0.1%", "(rows.jsonl line 7, ...)", "data.drop=[duplicate] leaves them out"):
        assert shown in text
    assert text.index("repeat an earlier one") < text.index("rows with NUL")
    assert "10 to 40, mean 25; 5% up to 10, median 10, 95% up to 40" in text
    assert "http://evil.example" not in str(page.tags)
    write_report(tmp_path, report)
    assert Report.model_validate_json((tmp_path / "report.json").read_text()).diagnosis == diagnosis

    clean = Report(title="run", diagnosis=Diagnosis(source="rows.jsonl", rows=3))
    assert "No faults found." in Page(render_html(clean)).text
    assert "data-checks" not in Page(render_html(Report(title="run"))).ids
