"""What `parley doctor` says of the links between GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from parley.models import doctor
from parley.models.doctor import link_kinds
from parley.units import GIB

NVLINKED = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t0-31\t0\t\tN/A
NIC0\tPIX\tSYS\t X

Legend:

  X    = Self
"""
PCIE = """\tGPU0\tGPU1\tGPU2\tCPU Affinity
GPU0\t X \tPHB\tSYS\t0-31
GPU1\tPHB\t X \tSYS\t0-31
GPU2\tSYS\tSYS\t X \t32-63
"""


@pytest.mark.parametrize(
    ("topology", "kinds"),
    [
        (NVLINKED, {"NVLink (NV18)": 1}),
        (PCIE, {"PCIe through the CPU": 1, "PCIe between two CPUs": 2}),
        ("", {}),
    ],
    ids=["NVLink", "PCIe", "nothing"],
)
def test_links_are_counted_by_pairs(topology: str, kinds: dict[str, int]) -> None:
    assert link_kinds(topology) == kinds


@pytest.mark.parametrize(
    ("count", "topology", "state", "value"),
    [
        (0, "", "good", "no GPU; several processes exchange through gloo"),
        (1, "", "good", "one GPU"),
        (2, NVLINKED, "good", "NVLink (NV18) between 1 of 1 pairs"),
        (3, PCIE, "note", "PCIe through the CPU between 1 of 3 pairs, PCIe between two CPUs between 2 of 3 pairs"),
        (3, "", "note", "memory of each other reached by 1 of 3 pairs; NVLink or PCIe is unknown"),
    ],
)
def test_links_are_a_line_of_the_report(
    monkeypatch: pytest.MonkeyPatch, count: int, topology: str, state: str, value: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda one, other: (one, other) == (0, 1))
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *arguments: topology)
    [finding] = doctor._links()
    assert finding.state == state
    assert finding.value.startswith(value)
    assert (finding.advice is None) == (state == "good")


def test_every_card_is_named_and_the_fullest_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    names, free = ["NVIDIA H200", "NVIDIA A100", "NVIDIA H200"], [100, 20, 130]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(doctor, "pick_device", lambda name: None)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda index: SimpleNamespace(name=names[index], major=9 - index % 2, minor=0),
    )
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free[index] * GIB, 141 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(doctor, "has_bf16", lambda: True)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda *arguments: "")
    found = {finding.name: finding for finding in doctor._gpu()}
    assert found["GPU"].value == ("2 x NVIDIA H200, compute capability 9.0, 1 x NVIDIA A100, compute capability 8.0")
    assert found["GPU memory"].value == "20.0 of 141.0 GiB free on GPU 1, which has the least"
    assert found["GPU memory"].state == "note"
    free[1] = 90
    assert doctor._gpu_memory().state == "good"
