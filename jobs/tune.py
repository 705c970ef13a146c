"""A sweep of pretrainings (ablations, data ladders), as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/tune.py --recipe cl_ablation --output s3://bucket/sweep \
        human='s3://cells/human/*.h5ad' mouse='s3://cells/mouse/*.h5ad'

Inputs: OUTPUT/corpus, or --set inputs.corpus=URI; the sources again, if an arm needs a corpus of its own (vocab, tokens, qc).
Outputs: OUTPUT/tune: trials.parquet (every figure), arms.parquet, effects.parquet, interactions.parquet, final.parquet (the best arm
    and the base on the cells that chose it and on test cells), best.json (the config of the best arm, for `mixgf pretrain --config`),
    trials/ (checkpoints). `mixgf report` has a section on it. In MLflow one parent run, a child per training; tune.register=NAME puts
    the best arm into the registry with a model card.
Resources: tune.concurrent arms at a time, each with one training of compute.num_workers workers at a time.
Time: jobs/RESULTS.md has a sweep of 66 trainings; the log has the time left.
After a failure: give the same line again. Trainings continue from their checkpoints, and scores are kept. With tune.stop=halving
    (the default) the result is that of a sweep without failures. With tune.search=optuna the arms chosen so far come first, and
    further ones may differ.
Errors: a field or value that no arm can have (the line names it). An arm whose loss is not finite is listed as failed, and the
    others continue.
Again: the same line continues a killed sweep and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["tune", *sys.argv[1:]]))
