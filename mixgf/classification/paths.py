"""Where a classification keeps its files: results of the artifact, and the intermediate files from which they are made.

Predictions and measures of whole embeddings stay, so that models can be added later. Counts, vectors and candidate classifiers
are removed at the end (`storage.layout.SCRATCH`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mixgf.classification.encoders import space_name
from mixgf.classification.splits import Split
from mixgf.config import parse
from mixgf.storage import files


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactPaths:
    """URIs of a classification's inputs, of its folder, and of its intermediate files."""

    corpus: str
    checkpoint: str
    output: str
    """The artifact's folder."""
    embeddings: str = ""
    """Vectors of all cells by the run's checkpoint; empty = they are made here, as intermediate files."""

    @property
    def intermediates(self) -> str:
        """The folder of intermediate files."""
        return files.join(self.output, "parts")

    def prediction(self, split: Split, model: str) -> str:
        """Predictions of one model, by its name, on one split.

        The settings that decide them are not in the file's name: one folder holds predictions of one set of settings.
        """
        key = parse.fingerprint([split.task, split.share, split.unseen, model])[:10]
        name = slug(f"{split.kind} {split.group} {split.direction} {split.seed} {split.unseen} {model}")
        return files.join(self.intermediates, "predictions", f"{name}-{key}.parquet")

    def classifier(self, group: str, model: str) -> str:
        """Folder of a classifier that may be kept for a group of cells."""
        return files.join(self.intermediates, "classifiers", f"{slug(group)}-{parse.fingerprint([group, model])[:8]}")

    def validation(self, group: str, model: str) -> str:
        """Predictions of training cells by a model that may be kept for a group of cells, and beside them its test scores (.json)."""
        name = f"{slug(f'{group} {model}')}-{parse.fingerprint([group, model])[:8]}"
        return files.join(self.intermediates, "validation", f"{name}.parquet")

    def counts(self, source: str) -> str:
        """Raw counts of one source."""
        return files.join(self.intermediates, "counts", f"{slug(source)}-{parse.fingerprint(source)[:8]}.parquet")

    def vectors(self, encoder: str) -> str:
        """Folder of the vectors by an encoder (`encoders.load`), one file per block of cells."""
        return files.join(self.intermediates, "vectors", space_name(encoder))

    def vectors_block(self, encoder: str, number: int) -> str:
        """Vectors of one block of cells by an encoder."""
        return files.join(self.vectors(encoder), f"{number:05d}.parquet")

    def integration(self, space: str, num_cells: int) -> str:
        """Map and measures of one embedding, from a sample of `num_cells` cells."""
        return files.join(self.intermediates, "integration", f"{space_name(space)}-{num_cells}.parquet")


def slug(text: str) -> str:
    """A file name of at most 60 bytes that people can read, with letters of all scripts; two texts may have the same."""
    name = re.sub(r"[^\w.]+", "-", text).lstrip(".-").rstrip("-")
    return name.encode(errors="ignore")[:60].decode(errors="ignore") or "_"


def unique_slugs(texts: Iterable[str]) -> dict[str, str]:
    """Each text's slug, with a key where two texts have the same one; upper and lower case count as the same."""
    names = {text: slug(text) for text in texts}
    alike = Counter(name.lower() for name in names.values())
    return {
        text: name if alike[name.lower()] == 1 else f"{name}-{parse.fingerprint(text)[:8]}"
        for text, name in names.items()
    }


def group_folder(group: str, splits: Sequence[Split]) -> str:
    """A group's folder."""
    return unique_slugs(s.group for s in splits)[group]
