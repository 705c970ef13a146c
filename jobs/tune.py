"""A sweep of pretrainings (ablations, data ladders), as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/tune.py --recipe cl_ablation --output s3://bucket/sweep \
        human='s3://cells/human/*.h5ad' mouse='s3://cells/mouse/*.h5ad'

Inputs: OUTPUT/corpus, or --set inputs.corpus=URI; the sources again, if an arm needs a corpus of its own (vocab, tokens, qc).
Outputs: OUTPUT/tune: trials.parquet (every figure), arms.parquet, effects.parquet, interactions.parquet, best.json (the config of
    the best arm, for `mixgf pretrain --config`), trials/ (checkpoints). `mixgf report` has a section on it. In MLflow one parent
    run, a child per training; tune.register=NAME puts the best arm into the registry with its card.
Resources: tune.concurrent trainings at a time, each of compute.num_workers workers.
Time: 66 trainings of up to 150 steps (cl_ablation, 20,601 cells) took 60 min on two busy cores; the log has the time left.
If anything dies: give the same line again. Trainings go on from their checkpoints; what was judged is not judged again; with
    tune.stop=halving (the default) the result is that of an undisturbed sweep.
If it stops by itself: a field or value that no arm can have (the line names it). An arm whose loss is not finite is listed as
    failed, and stops no other.
Again: the same line continues a killed sweep and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["tune", *sys.argv[1:]]))
