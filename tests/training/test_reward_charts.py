"""The report of a preference run or of GRPO draws rewards, margins, accuracies and the divergence from its events."""

from __future__ import annotations

from typing import Any

from parley.evaluation.report_events import MAX_SAMPLES, add_events, steps_of_events
from parley.training.report import Report, Scores, charts, render_html, score_changes


def report_of(events: list[dict[str, Any]], **scores: float) -> Report:
    report = Report(title="run", steps=steps_of_events(events))
    add_events(report, events)
    report.before = Scores(**dict.fromkeys(scores, 0.5))
    report.after = Scores(**scores)
    return report


def titles(report: Report) -> list[str]:
    return [chart.title for chart in charts(report)]


def test_a_preference_run_draws_margins_accuracy_and_divergence() -> None:
    events: list[dict[str, Any]] = [
        {
            "event": "step", "step": step, "loss": 0.6, "rewards/margins": step / 10, "rewards/chosen": 0.1,
            "rewards/rejected": -0.1, "preference_accuracy": 0.7, "kl": 0.2, "learning_rate": 1e-4,
        }
        for step in (1, 2, 3)
    ]  # fmt: skip
    events.append({"event": "eval", "step": 2, "eval_loss": 0.5, "eval_preference_accuracy": 0.9})
    report = report_of(events, preference_accuracy=0.95)
    assert report.steps[1].heldout_preference_accuracy == 0.9
    assert titles(report)[:4] == [
        "Preference accuracy", "Reward margin", "Reward of chosen answers", "Reward of rejected answers",
    ]  # fmt: skip
    assert "Divergence" in titles(report)
    accuracy = charts(report)[0]
    assert [dot.label for dot in accuracy.dots][-1].endswith("0.95") or len(accuracy.dots) == 3
    assert [(change.name, change.before, change.after) for change in score_changes(report)] == [
        ("Preference accuracy", "50%", "95%")
    ]
    losses = Scores(heldout_loss=0.5, heldout_tokens=88)
    assert score_changes(report.model_copy(update={"before": losses, "after": losses}))[-1].note == (
        "of the method's objective"  # a mean over pairs
    )


def test_grpo_draws_rewards_and_lengths_and_shows_samples() -> None:
    sample = {"prompt": "Q", "completion": "<b>A</b>", "reward": 0.25, "advantage": -1.0}
    events: list[dict[str, Any]] = []
    for step in range(1, 31):
        events.append(
            {"event": "step", "step": step, "loss": 0.0, "reward": step / 30, "completions/mean_length": 12.0}
        )
        events.append({"event": "completions", "step": step, "samples": [sample, {"prompt": 3}, None]})
    events.append({"event": "eval", "step": 30, "eval_loss": 0.0, "eval_reward": 0.9})
    report = report_of(events, reward=0.9)
    assert titles(report)[:2] == ["Reward", "Loss"]
    assert "Answer length" in titles(report)
    assert report.steps[-1].heldout_loss is None, "the loss of a policy gradient says nothing of the policy"
    assert len(report.samples) == MAX_SAMPLES
    assert (report.samples[0].step, report.samples[-1].step) == (1, 30)
    page = render_html(report)
    assert "&lt;b&gt;A&lt;/b&gt;" in page
    assert "<b>A</b>" not in page


def test_a_supervised_run_draws_none_of_them() -> None:
    report = report_of([{"event": "step", "step": 1, "loss": 1.0}], heldout_loss=1.0)
    assert titles(report) == ["Loss"]
