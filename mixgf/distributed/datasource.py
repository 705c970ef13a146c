"""The data source of Ray Data that all reads of cells use: work that is cut into pieces of known size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one read task reads."""

    read: Callable[[], Iterable[pa.Table]]
    rows: int
    uri: str | None = None
    num_bytes: int = 0
    """Estimate of the rows in memory, by which Ray Data plans."""


class Pieces(Datasource):  # type: ignore[misc]
    """One read task per piece; `name` is shown by Ray Data as `ReadNAME`."""

    def __init__(self, name: str, pieces: Sequence[Piece], schema: pa.Schema | None = None) -> None:
        super().__init__()
        self._name, self.pieces, self._schema = name, list(pieces), schema

    def get_name(self) -> str:
        """Name of the operator, without `Read`."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows."""
        return sum(piece.num_bytes for piece in self.pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task per piece; a piece is not cut further, whatever `parallelism` says."""
        del parallelism, data_context
        return [
            ReadTask(
                piece.read,
                BlockMetadata(
                    num_rows=piece.rows,
                    size_bytes=piece.num_bytes,
                    input_files=[piece.uri] if piece.uri else None,
                    exec_stats=None,
                ),
                schema=self._schema,
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self.pieces
        ]


def dataset(source: Pieces, **options: Any) -> Dataset:
    """A data set with one block per piece."""
    return ray.data.read_datasource(source, override_num_blocks=max(1, len(source.pieces)), **options)
