"""Corpus to encoder, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/pretrain.py --recipe paper --output s3://bucket/run

Inputs: OUTPUT/corpus, or --set inputs.corpus=URI.
Outputs: OUTPUT/pretrain (model.safetensors, history.parquet, the latest train.keep_checkpoints of steps/).
Resources: compute.num_workers workers of compute.gpus_per_worker GPUs; --set compute.min_workers=N makes it elastic: after
    the loss of a node the group starts again with what is left (after RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, here 180), and
    when there is room for more workers again, which is looked for every compute.resize_seconds, with those as well.
Before the start it says parameters, GFLOP per cell, steps, what padding would have cost, and (on CPUs) a time.
While it runs, MLflow has, at every checkpoint: loss, mlm, contrast, simcsepp, ortholog (those with a weight), alignment,
    uniformity, grad_norm, lr, cells_per_s, tokens_per_s (no padding counted), mfu (of the measured GEMM peak), wait_share
    (for data), memory_gb. Prometheus has the same at every logged step.
If a worker, a node or the driver dies: Ray starts the group again up to compute.max_failures times; after that, or when the
    driver died, give the same line again. It goes on from the latest complete checkpoint, with the same losses bit for bit
    at the same number of workers, with the same cells in the same batches at any other.
If it stops by itself: a loss that is not finite (the line names the step), a checkpoint that cannot be read (the line names
    the file; it never starts over), a checkpoint that cannot be written, or one of another config. Nothing else is lost.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
