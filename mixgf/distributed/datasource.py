"""The data source of Ray Data that all reads of cells use: work that is cut into pieces of known size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

NARROW_BYTES = 100
"""Estimate of a row without its lists."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one read task reads."""

    read: Callable[..., Iterable[pa.Table]]
    """Gives the tables. In a source that prunes it is called with the names of the columns to read, in their order."""
    rows: int
    uri: str | None = None
    num_bytes: int = 0
    """Estimate of the rows in memory, by which Ray Data plans."""


class Pieces(Datasource):  # type: ignore[misc]
    """One read task per piece; `name` is shown by Ray Data as `ReadNAME`."""

    def __init__(
        self, name: str, pieces: Sequence[Piece], schema: pa.Schema | None = None, *, prunes: bool = False
    ) -> None:
        super().__init__()
        assert schema is not None or not prunes
        self._projection_map: dict[str, str] | None = (
            None  # Ray Data's own; its base class reads it and does not set it
        )
        self._name, self.pieces, self._schema, self._prunes = name, list(pieces), schema, prunes

    def supports_projection_pushdown(self) -> bool:
        """Whether Ray Data may hand over the columns that are used (`select_columns`, `count`), so that only they are read."""
        return self._prunes

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
        names, schema = self._get_data_columns(), self._schema
        if schema is not None and names is not None:
            schema = pa.schema([schema.field(name) for name in names])
        wide = schema is None or any(pa.types.is_nested(field.type) for field in schema)
        return [
            ReadTask(
                partial(piece.read, schema.names) if self._prunes and schema is not None else piece.read,
                BlockMetadata(
                    num_rows=piece.rows,
                    size_bytes=piece.num_bytes if wide else piece.rows * NARROW_BYTES,
                    input_files=[piece.uri] if piece.uri else None,
                    exec_stats=None,
                ),
                schema=schema,
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self.pieces
        ]


def dataset(source: Pieces, **options: Any) -> Dataset:
    """A data set with one block per piece."""
    return ray.data.read_datasource(source, override_num_blocks=max(1, len(source.pieces)), **options)
