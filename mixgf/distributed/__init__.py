"""Ray: data, training groups, actor pools and tasks on a cluster. The only package that imports ray."""

import os

# read when ray.data is imported: with the prefetch thread, the end of a data set is noticed 0.2 s late
os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
