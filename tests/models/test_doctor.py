import dataclasses
from importlib import metadata

import pytest
import torch

from parley.models import doctor
from parley.models.doctor import diagnose


def by_name():
    return {finding.name: finding for finding in diagnose()}


def test_this_machine_is_described():
    findings = by_name()
    assert findings["torch"].value == torch.__version__
    assert {"Python", "transformers", "trl", "GPU", "NF4 weights", "8-bit AdamW", "CPU", "memory", "hub"} <= set(
        findings
    )
    for finding in findings.values():
        assert finding.state == "good" or finding.advice, finding
        assert "\n" not in f"{dataclasses.astuple(finding)}"


def test_bitsandbytes_kernels_ran():
    findings = by_name()
    assert findings["NF4 weights"].value.startswith("work on")
    assert findings["8-bit AdamW"].value.startswith("works on")


def test_versions_out_of_range_or_missing_come_from_the_metadata(monkeypatch):
    wanted = ["torch<2,>=1", "typer>=0.1", "no-such-package>=1", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    findings = by_name()
    assert (findings["torch"].state, findings["torch"].advice) == ("note", "pip install 'torch<2,>=1'")
    assert findings["typer"].state == "good"
    assert findings["no-such-package"].state == "bad"
    assert "pytest" not in findings


def test_not_installed_is_noted(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", absent)
    assert by_name()["parley-llm"].state == "note"


def test_wrong_or_failing_kernels_are_bad(monkeypatch):
    from bitsandbytes import functional, optim

    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))

    def fails(self, closure=None):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(optim.AdamW8bit, "step", fails)
    findings = by_name()
    assert findings["NF4 weights"].state == "bad"
    assert findings["8-bit AdamW"].state == "bad"
    assert "no kernel image is available" in findings["8-bit AdamW"].value


def test_offline_and_little_memory_are_noted(monkeypatch):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    memory = doctor.psutil.virtual_memory()
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory._replace(available=2**30))
    findings = by_name()
    assert findings["hub"].advice == "unset HF_HUB_OFFLINE to download models and data"
    assert findings["memory"].state == "note"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_described():
    findings = by_name()
    assert "compute capability" in findings["GPU"].value
    assert "driver" in findings["CUDA"].value
    assert "on cuda" in findings["NF4 weights"].value


@pytest.mark.parametrize(
    ("capability", "version", "state", "words"),
    [
        ((9, 0), "4.0.0b36", "good", "flash-attn-4 4.0.0b36"),
        ((9, 0), None, "note", "cuDNN"),
        ((9, 0), "4.0.0b2", "note", "cuDNN; flash-attn-4 4.0.0b2, tested with 4.0.0b36"),
        ((8, 0), "4.0.0b36", None, None),
    ],
)
def test_what_attends_to_long_conversations(monkeypatch, capability, version, state, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(doctor.flash_attn, "installed_version", lambda: version)
    found = list(doctor._long_attention(torch.device("cuda")))
    assert [(finding.state, finding.value) for finding in found] == ([] if state is None else [(state, words)])
    assert all(finding.state == "good" or "parley-llm[hopper]" in finding.advice for finding in found)
