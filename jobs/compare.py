"""Across species: one space, transfer both ways, model matching, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/compare.py --output s3://bucket/run

Inputs: OUTPUT/corpus and OUTPUT/pretrain; the sources themselves, for controls on genes.
Outputs: OUTPUT/compare (tables as Parquet).
Resources: independent tasks of one CPU (or compute.gpus_per_worker GPUs for vectors).
Time: 26 shifts took 1 min 40 s on two cores, on a finished classification; the log has the time left.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["compare", *sys.argv[1:]]))
