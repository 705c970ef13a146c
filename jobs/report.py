"""One HTML file of all finished stages, as a cluster job.

Submit, from the checkout (RAY_API_SERVER_ADDRESS or --address names the cluster):
    ray job submit --working-dir . -- python jobs/report.py --output s3://bucket/run

Inputs: the artifacts under OUTPUT.
Outputs: OUTPUT/report.html.
Resources: one CPU, on the head: it starts no tasks.
Again: the same line continues a killed run and does nothing to a finished one.
"""

import sys

from mixgf.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["report", *sys.argv[1:]]))
