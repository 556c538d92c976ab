import pytest
import torch

from parley.errors import DeviceError
from parley.models.device import describe_device, pick_device, pick_dtype, seeded

CPU = torch.device("cpu")


def test_cpu_takes_fp32_and_what_it_is_told():
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert "CPU with" in describe_device(CPU)


def test_absent_gpu_is_one_line_naming_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(DeviceError, match=r"model\.device is cuda.*a CPU with.*model\.device: cpu") as caught:
        pick_device("cuda")
    assert "\n" not in str(caught.value)


def test_gpu_without_bf16_takes_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda", 0)
    assert pick_dtype("auto", gpu) == torch.float16
    with pytest.raises(DeviceError, match=r"Tesla T4 has no bf16.*model\.dtype: float16"):
        pick_dtype("bfloat16", gpu)


def test_seeded_repeats_and_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7, CPU):
        first = torch.rand(3)
    with seeded(7, CPU):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_picked_and_named():
    gpu = pick_device("auto")
    assert gpu.type == "cuda"
    assert "GiB" in describe_device(gpu)
    assert pick_dtype("auto", gpu) in (torch.bfloat16, torch.float16)
