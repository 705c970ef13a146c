"""In silico perturbation, as an autoscaling cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/perturb.py --output s3://bucket/run --config screen.json

Inputs: OUTPUT/corpus and OUTPUT/pretrain.
Outputs: OUTPUT/perturb (one row per gene and operation; idempotent parts).
Resources: up to compute.num_workers actors; pending actors are the autoscaler's demand.
Time: `mixgf perturb ... --dry-run` with the same arguments prints sentences, FLOP, time and, with perturb.price, the cost.
    perturb.budget_hours and perturb.budget_cost limit it.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["perturb", *sys.argv[1:]]))
