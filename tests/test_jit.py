import os
import subprocess
import sys

import pytest

DOUBLETS = """
from mixgf.cells.doublets import scrublet
from scipy import sparse
x = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (150, 300)))
scrublet(x.data, x.indices, x.indptr, 300, rate=0.06, seed=0)
"""
MAP = """
from mixgf.classification.umap import umap_layout
umap_layout(np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32), 0)
"""


@pytest.mark.parametrize("work", [DOUBLETS, MAP], ids=["doublets", "map"])
def test_torch_has_its_number_of_threads_after_libraries_whose_functions_are_parallel_in_numba(work):
    """In a process of its own: the first such function of a process starts numba's threads, here three.

    Torch has worked before: only at its first work in a thread does it set OpenMP's number itself.
    """
    code = f"import numpy as np, torch\ntorch.set_num_threads(1)\ntorch.ones(100_000).sum()\n{work}\nimport numba\nprint(torch.get_num_threads(), numba.threading_layer())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"NUMBA_NUM_THREADS": "3"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    number, layer = done.stdout.split()
    assert layer in ("omp", "tbb", "workqueue"), "numba's threads were started"
    assert number == "1"
