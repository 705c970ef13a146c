"""Where a process computes: on the CPU, or on the CUDA GPU that `compute.gpus_per_worker` asks for."""

from __future__ import annotations

import os

import torch

from mixgf.errors import UserError


def pick_device(gpus: float) -> torch.device:
    """The device of this process.

    Args:
        gpus: `compute.gpus_per_worker`, the GPUs that a worker asks for; below 1 it shares one with other workers.

    Returns:
        The CPU where no GPU is asked for, else the current CUDA device.

    Raises:
        UserError: a GPU is asked for, and torch finds none in this process.
    """
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        msg = (
            f"compute.gpus_per_worker = {gpus:g}: no GPU here, {_missing()}; "
            f"use a machine with a CUDA GPU, or set compute.gpus_per_worker=0 to compute on the CPU"
        )
        raise UserError(msg)
    return torch.device("cuda")


def _missing() -> str:
    """Why torch finds no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f", and CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none{hidden}"
