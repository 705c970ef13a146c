"""Corpus to encoder, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/pretrain.py --recipe paper --output s3://bucket/run

Inputs: OUTPUT/corpus, or --set inputs.corpus=URI.
Outputs: OUTPUT/pretrain (model.safetensors, history.parquet, the latest train.keep_checkpoints of steps/).
Resources: compute.num_workers workers of compute.gpus_per_worker GPUs; --set compute.min_workers=N makes it elastic. After
    the loss of a node the group starts again with the workers that are left (after RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, 180 by
    default). Every compute.resize_seconds it looks for room for more workers, and then starts again with those as well.
Before the start it prints parameters, GFLOP per cell, steps, the cost of padding that is avoided, and (on CPUs) a time.
While it runs, MLflow has, at every checkpoint: loss, mlm, contrast, simcsepp, ortholog (those with a weight), alignment,
    uniformity, grad_norm, lr, cells_per_s, tokens_per_s (no padding counted), mfu (of the measured GEMM peak), wait_share
    (for data), memory_gb. Prometheus has the same at every logged step.
After a failure of a worker or node, Ray starts the group again, up to compute.max_failures times. After that, or after a failure of
    the driver, give the same line again. It continues from the latest complete checkpoint. At the same number of workers the losses
    are the same bit for bit; at another number, the same cells are in the same batches.
Errors: a loss that is not finite (the line names the step), a checkpoint that cannot be read (the line names the file; the training
    does not start from the beginning), a checkpoint that cannot be written, or one of another config.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
