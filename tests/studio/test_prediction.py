"""What a run would take, as `parley plan` says it, and the settings that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from parley.config import RunConfig
from parley.errors import DataError, UsageError
from parley.studio import prediction
from parley.studio.prediction import Prediction, predict, references
from parley.training.plan.run_plan import plan

SMALL = "data: {limit: 8, heldout_rows: 2}\ntraining: {max_steps: 2, gradient_checkpointing: false}\n"


def test_a_prediction_is_the_plan(tmp_path: Path) -> None:
    output = f"output: {tmp_path / 'run'}\n"
    found = predict(SMALL + output)
    wanted = plan(
        RunConfig.create(
            {
                "data": {"limit": 8, "heldout_rows": 2},
                "output": str(tmp_path / "run"),
                "training": {"max_steps": 2, "gradient_checkpointing": False},
            }
        )
    ).to_json()
    assert found.plan is not None
    for name in ("parameters", "steps", "tokens", "disk", "peak_bytes", "rows"):
        assert found.plan[name] == wanted[name]
    assert found.verdict == "fits"


def test_rows_are_rendered_once_for_settings_that_leave_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    predict(SMALL)
    monkeypatch.setattr("parley.training.plan.run_plan.read_data", None)
    assert predict(SMALL + "lora: {r: 2}\n").plan != predict(SMALL).plan
    with pytest.raises(TypeError):
        predict(SMALL.replace("limit: 8", "limit: 9"))


def test_later_errors_are_the_commands() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'training.learning_rat' .* did you mean 'learning_rate'"):
        predict("training: {learning_rat: 1}\n")
    with pytest.raises((DataError, UsageError), match=r"nowhere\.jsonl"):
        predict("data: nowhere.jsonl\n")


def test_preferences_are_checked_and_not_planned() -> None:
    found = predict("training: {method: dpo, max_steps: 1}\ndata: parley-demo-preferences\n")
    assert found.plan is None
    assert "not planned" in (found.note or "")
    with pytest.raises(UsageError, match="bogus"):
        predict("training: {method: dpo, bogus: 1}\n")


@pytest.mark.parametrize(("peak", "verdict"), [(84, "fits"), (86, "tight"), (100, "tight"), (101, "does not fit")])
def test_verdicts(peak: int, verdict: str) -> None:
    assert Prediction({"peak_bytes": peak, "free_bytes": 100, "fits": peak <= 100}).verdict == verdict
    assert 0 < prediction.TIGHT < 1


def test_references_have_the_libraries_fields_and_none_that_are_refused() -> None:
    keys = {each.key: each for each in references()}
    assert {"training.max_grad_norm", "lora.use_dora", "training.learning_rate", "lora.r", "model.name"} <= set(keys)
    assert "training.output_dir" not in keys
    assert keys["training.max_grad_norm"].default == "1.0"
    assert "rank" in keys["lora.r"].description.lower()
