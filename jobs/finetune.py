"""One classifier of all labelled cells, fine-tuned by a group of workers, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/finetune.py --output s3://bucket/run --set compute.num_workers=8 --set compute.gpus_per_worker=1

Inputs: OUTPUT/corpus with a column of labels, and OUTPUT/pretrain.
Outputs: OUTPUT/finetune (a classifier for `mixgf annotate`, and the history of its training).
Resources: compute.num_workers workers of compute.cpus_per_worker CPUs and compute.gpus_per_worker GPUs.
Time: two forward passes and a backward pass per training cell and epoch; the progress shows the time left.
Again: the same line continues a killed run from its latest checkpoint and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
