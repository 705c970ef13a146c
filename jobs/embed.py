"""Cells to vectors, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/embed.py --output s3://bucket/run

Inputs: OUTPUT/corpus and OUTPUT/pretrain, or --set inputs.corpus=URI --set inputs.checkpoint=URI.
Outputs: OUTPUT/embed (vectors as Parquet, cells.h5ad with .obsm).
Resources: compute.num_workers workers of compute.gpus_per_worker GPUs.
Time: the log has cells per second and the time left.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["embed", *sys.argv[1:]]))
