"""Cell types: fine-tuning, probes, transfer and baselines, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/classify.py --output s3://bucket/run --set classify.seeds=5

Inputs: OUTPUT/corpus and OUTPUT/pretrain; the sources themselves, for the baselines.
Outputs: OUTPUT/classify (scores, per-class scores, confusions, predictions, the best classifier of each group for `mixgf annotate`).
Resources: independent tasks of one CPU (or compute.gpus_per_worker GPUs for fine-tuning).
Time: `mixgf classify ... --dry-run` with the same arguments prints the number of predictions and the time.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["classify", *sys.argv[1:]]))
