"""How DistributedDataParallel adds up the gradients of all workers.

DistributedDataParallel averages by default. Here every loss is a share of the loss of the global batch, so its gradients
are summed. No loss is multiplied by the number of workers.

The module has no postponed annotations: torch reads those of a communication hook.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ARGUMENTS: dict[str, Any] = {"gradient_as_bucket_view": True}
"""Arguments of DistributedDataParallel: gradients lie in its buckets, so they are in memory once."""


def sum_float32(
    group: dist.ProcessGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket of gradients over the workers; None = the default group."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def sum_bfloat16(
    group: dist.ProcessGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """As `sum_float32`, with half the bytes: gradients travel as bfloat16 and have 8 significant bits after the sum."""
    work = dist.all_reduce(bucket.buffer().to(torch.bfloat16), group=group, async_op=True)
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


HOOKS = {"fp32": sum_float32, "bf16": sum_bfloat16}
"""Communication hooks by `train.reduce`."""


def settle_buckets(parallel: nn.Module) -> None:
    """Fix the layout of DistributedDataParallel's buckets before the first step.

    It chooses the layout after its first backward pass, and tells the other workers in its second forward pass. A group of
    three workers or more sums in an order that depends on the layout. A resumed training therefore needs the layout of the
    uninterrupted one. Workers with different numbers of micro batches would also meet that message at different times.
    """
    if isinstance(parallel, DistributedDataParallel):
        for _ in range(2):
            parallel(None).backward()
