"""Corpus to encoder, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/pretrain.py --recipe paper --output s3://bucket/run

Inputs: OUTPUT/corpus, or --set inputs.corpus=URI.
Outputs: OUTPUT/pretrain (model.safetensors, history, resumable steps).
Resources: compute.num_workers workers of compute.gpus_per_worker GPUs; --set compute.min_workers=N makes it elastic.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
