import pytest
import torch

from mixgf.encoder import device
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError


def cuda(monkeypatch, *, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)


@pytest.mark.parametrize("available", [False, True])
def test_without_a_gpu_asked_for_the_cpu_computes(monkeypatch, available):
    cuda(monkeypatch, available=available)
    assert pick_device(0.0) == torch.device("cpu")


@pytest.mark.parametrize("gpus", [1.0, 0.25])
def test_a_gpu_asked_for_is_the_current_cuda_device(monkeypatch, gpus):
    cuda(monkeypatch, available=True)
    assert pick_device(gpus) == torch.device("cuda")


def test_a_gpu_asked_for_and_missing_is_one_line_with_what_was_found_and_the_way_out(monkeypatch):
    cuda(monkeypatch, available=False)
    monkeypatch.setattr(device.torch.version, "cuda", "13.0")
    monkeypatch.setattr(device.torch, "__version__", "9.9.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError) as caught:
        pick_device(0.5)
    assert str(caught.value) == (
        "compute.gpus_per_worker = 0.5: no GPU here, torch 9.9.0 for CUDA 13.0 finds none; "
        "use a machine with a CUDA GPU, or set compute.gpus_per_worker=0 to compute on the CPU"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"for CUDA 13.0 finds none, and CUDA_VISIBLE_DEVICES is ''; use"):
        pick_device(1.0)
    monkeypatch.setattr(device.torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"gpus_per_worker = 1: no GPU here, torch 9.9.0 is built without CUDA; use"):
        pick_device(1.0)
