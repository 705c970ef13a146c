r"""Counts to corpus, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/prepare.py --recipe paper \
        'human=s3://bucket/human/*.h5ad' 'mouse=s3://bucket/mouse/*.h5ad' --output s3://bucket/run

Inputs: raw counts (.h5ad, 10x .h5, 10x folders), local to every node or in object storage.
Outputs: OUTPUT/vocabulary and OUTPUT/corpus (sentences as Parquet; index, mapping, dropped cells and hashes).
Resources: one CPU per task; memory does not grow with the file. No GPU.
Time: 7,300 cells per second on two AVX-512 cores (`jobs/bench.py prepare`: 300,000 cells, three passes); the log has the time left.
Exit code: 3 if sources were refused (each is named) and the rest is done; 2 if something given cannot be used; 1 for a fault.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
