r"""Tokenised Arrow data sets to corpus, as a cluster job: how the paper's human and mouse corpora are rebuilt.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/import_corpus.py human=s3://bucket/genecorpus_30M.dataset \
        mouse=s3://bucket/mouse-genecorpus-20M.dataset --output s3://bucket/run \
        --set imports.dictionaries=human=s3://bucket/human_tokens.pkl,mouse=s3://bucket/mouse_tokens.pkl \
        --set imports.medians=human=s3://bucket/human_medians.pkl,mouse=s3://bucket/mouse_medians.pkl

Inputs: folders that save_to_disk wrote (or folders of .arrow files), a token dictionary and medians for each species.
Outputs: OUTPUT/vocabulary and OUTPUT/corpus, as `prepare` makes them; corpus/imported.parquet counts what was left out.
Resources: one CPU per task. No GPU. In object storage, every .arrow file is read twice, once as a whole to the task's disk.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["import", *sys.argv[1:]]))
