from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parley.models import doctor as findings_module
from parley.models.doctor import Finding

FINE = Finding(name="torch", value="2.12", state="good", advice=None)
SLOW = Finding(name="GPU", value="none", state="note", advice="train on a machine with a GPU")
OLD = Finding(name="trl", value="0.9", state="bad", advice="pip install 'trl>=1.15'")


@pytest.mark.parametrize(("findings", "code"), [([FINE, SLOW], 0), ([FINE, OLD], 1)])
def test_findings_are_a_table_and_a_bad_one_an_exit_code(
    parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, findings: list[Finding], code: int
) -> None:
    monkeypatch.setattr(findings_module, "diagnose", lambda: findings)
    ended = parley("doctor")
    assert (ended.code, ended.err) == (code, "")
    for finding in findings:
        assert any(finding.name in line and finding.value in line for line in ended.out.splitlines())
    as_json = parley("doctor", "--json")
    assert as_json.code == code
    assert json.loads(as_json.out) == [vars(finding) for finding in findings]


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("gemma3", "fused step and Parley's decoder (gemma3_text family); dropout and DoRA"),
        (
            "starcoder2",
            "plain path: no fused step for the starcoder2 family; the captured path on a GPU, or here with",
        ),
    ],
)
def test_a_model_s_training_path_is_said_beforehand(
    parley: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    build_family: Callable[[str], Path],
    family: str,
    found: str,
) -> None:
    monkeypatch.setattr(findings_module, "diagnose", lambda: [FINE])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = json.loads(parley("doctor", "--model", str(build_family(family)), "--json").out)
    assert findings[1]["value"].startswith(found)


def test_a_model_that_is_not_there_is_one_line(parley: Callable[..., Any], tmp_path: Path) -> None:
    ended = parley("doctor", "--model", str(tmp_path / "gone"))
    assert ended.code == 1
    assert "gone" in ended.err
    assert "Traceback" not in ended.err


def test_this_machine_is_checked(parley: Callable[..., Any]) -> None:
    found = json.loads(parley("doctor", "--json").out)
    assert {"good", "note", "bad"} >= {finding["state"] for finding in found}
    assert "torch" in {finding["name"].lower() for finding in found}
