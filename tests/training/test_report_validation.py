"""The report of what happened during training: held-out loss, changing answers, and steps that need a look."""

from __future__ import annotations

import math
import re

from parley.evaluation.report_events import MAX_SPIKES, add_step_faults, steps_of_events
from parley.training.charts import line_chart
from parley.training.report import Report, StepAnswer, StepFault, charts, render_html


def test_answers_during_training_are_shown_and_equal_ones_in_a_row_are_one(pirate_report: Report) -> None:
    answer = pirate_report.answers[0]
    texts = {100: "Tope is a fish.", 300: "Arr, <b>tope</b>.", 200: "Tope is a fish.", 400: ""}
    answer.during = [StepAnswer(step=step, text=text) for step, text in texts.items()]
    html = render_html(pirate_report)
    (shown,) = re.findall(r'<details class="during".*?</details>', html, re.DOTALL)
    tags = re.findall(r'<span class="tag">step (.*?)</span>', shown)
    assert tags == ["100 to 200", "300", "400"]
    assert shown.count("Tope is a fish.") == 1
    assert "Arr, &lt;b&gt;tope&lt;/b&gt;." in shown  # an answer is text
    assert "(an empty answer)" in shown


def test_steps_that_need_a_look_are_listed_with_their_rows_and_marked(pirate_report: Report) -> None:
    pirate_report.steps[611].loss = 5.25
    pirate_report.step_faults = [
        StepFault(step=612, kind="spike", loss=5.25, typical=1.5, rows=["rows.jsonl line 3", "<i> line 4"]),
        StepFault(step=700, kind="nonfinite", loss=math.nan),
        StepFault(step=800, kind="nonfinite", loss=2.0, rows=["rows.jsonl line 9"]),
    ]
    html = render_html(pirate_report)
    (section,) = re.findall(r'<section id="faults">.*?</section>', html, re.DOTALL)
    rows = [re.sub("<[^>]*>", "|", row) for row in re.findall("<tr>(.*?)</tr>", section)[1:]]
    assert rows == [
        "|612||loss spike: 1.5 was typical||5.25||rows.jsonl line 3, &lt;i&gt; line 4|",
        "|700||loss not finite, update not applied||not finite||not known|",
        "|800||gradient not finite, update not applied||2||rows.jsonl line 9|",
    ]
    (spike,) = charts(pirate_report)[0].spikes
    assert spike.label == "step 612: 5.25"
    assert "loss spike, step 612: 5.25" in html
    assert Report.model_validate_json(pirate_report.model_dump_json()).step_faults[0] == pirate_report.step_faults[0]


def test_a_report_without_them_has_no_such_section(pirate_report: Report) -> None:
    html = render_html(pirate_report)
    assert 'id="faults"' not in html
    assert '<details class="during"' not in html


def test_held_out_losses_are_joined_in_the_order_of_their_steps() -> None:
    chart = line_chart("Loss", "", [(1, 2.0), (10, 1.0)], dots=[(10, 1.0), (1, 2.0), (5, None)])
    assert chart is not None
    first, second = chart.dots
    assert chart.dots_line == f"M{first.x:g} {first.y:g}L{second.x:g} {second.y:g}"
    assert first.x < second.x
    alone = line_chart("Loss", "", [(1, 2.0)], dots=[(1, 2.0)])
    assert alone is not None
    assert alone.dots_line == ""


def test_a_spike_outside_the_logged_losses_is_within_the_chart() -> None:
    chart = line_chart("Loss", "", [(10, 1.0), (20, 1.1)], spikes=[(15, 9.0)])
    assert chart is not None
    assert 0 <= chart.spikes[0].y <= 100
    assert float(chart.y_ticks[-1].label) >= 9


def test_the_dot_after_training_is_at_the_step_whose_weights_were_kept(pirate_report: Report) -> None:
    pirate_report.kept_step = 600
    labels = [dot.label for dot in charts(pirate_report)[0].dots]
    assert "step 600: 1.33" in labels
    assert "step 1,000: 1.33" not in labels


def test_faults_come_from_the_event_log_and_only_the_highest_spikes_are_kept() -> None:
    report = Report(title="x")
    spikes = [
        {"event": "spike", "step": 10 + n, "loss": 5.0 + n % 30, "typical": 1.0, "rows": ["a"]}
        for n in range(MAX_SPIKES + 10)
    ]
    events = [
        *spikes,
        {"event": "nonfinite", "step": 5, "loss": "NaN", "grad_norm": "Infinity", "rows": ["b"]},
        {"event": "spike", "step": "many", "loss": 1.0, "typical": 1.0, "rows": []},
        {"event": "step", "step": 5, "learning_rate": 0.1},
    ]
    add_step_faults(report, events)
    assert len(report.step_faults) == MAX_SPIKES + 1
    assert report.step_faults[0].kind == "nonfinite"
    assert min(fault.loss or 0 for fault in report.step_faults[1:]) == 15.0
    (row,) = steps_of_events(events[-3:])
    assert row.loss is not None
    assert math.isnan(row.loss)
    assert row.grad_norm == math.inf
    add_step_faults(report, [])  # a log that is gone does not empty the report
    assert report.step_faults
