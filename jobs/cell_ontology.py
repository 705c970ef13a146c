"""Make the bundled table of the Cell Ontology again, from the package cellxgene-ontology-guide.

    pip install cellxgene-ontology-guide zstandard
    python jobs/cell_ontology.py mixgf/resources/cell_ontology.parquet

One row per term that is not obsolete: `id`, `name` and `parents` (ids of its direct is_a parents). The release is in the table's
metadata. The Cell Ontology is CC BY 4.0 (Diehl et al. 2016, Journal of Biomedical Semantics 7:44).
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read() -> tuple[str, dict[str, Any]]:
    """Release and terms of the newest Cell Ontology in the package."""
    folder = Path(str(resources.files("cellxgene_ontology_guide") / "data"))
    path = max(folder.glob("CL-ontology-v*.json.zst"))
    with pa.input_stream(str(path), compression="zstd") as stream:
        terms = json.loads(stream.read())
    return path.name.removeprefix("CL-ontology-").removesuffix(".json.zst"), terms


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    release, terms = read()
    there = {key: term for key, term in sorted(terms.items()) if key.startswith("CL:") and not term.get("deprecated")}
    # `ancestors` holds the number of steps to each: those one step away are the parents
    parents = [
        sorted(a for a, steps in term["ancestors"].items() if steps == 1 and a in there) for term in there.values()
    ]
    table = pa.table({"id": list(there), "name": [term["label"] for term in there.values()], "parents": parents})
    about = {
        "release": release,
        "licence": "CC BY 4.0",
        "source": "Cell Ontology, http://purl.obolibrary.org/obo/cl.owl",
    }
    pq.write_table(table.replace_schema_metadata(about), args.output, compression="zstd", compression_level=19)


if __name__ == "__main__":
    main()
