"""The model that MLflow loads and serves: an encoder or a kept classifier on files of raw counts.

MLflow runs this file when a model that mixgf logged is loaded ("models from code"); nothing is unpickled. Input is a frame with one
column `path`; parameters are `layer`, `genes` and `species`, as of `mixgf.api.CellEncoder.embed`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from mixgf import api
from mixgf.cells.open import open_reader


class ServedModel(PythonModel):
    """An encoder or a classifier as an MLflow model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights."""
        folder = context.artifacts["run"]
        kind = context.model_config["kind"]
        self._model: Any = api.load(folder) if kind == "encoder" else api.load_classifier(folder)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row per cell of every file, in order.

        Args:
            context: Of MLflow; not used here.
            model_input: Frame with the column `path`: `.h5ad`, 10x `.h5` or 10x folders, local or `s3://`.
            params: `layer`, `genes`, `species`.

        Returns:
            `path`, `cell`, and `vector` (a list of numbers) of an encoder or the columns of
            `mixgf.api.CellClassifier.annotate` without their prefix of a classifier.

        Raises:
            UserError: A file is missing, or is no file of raw counts that the model can read.
        """
        chosen = {name: value for name, value in (params or {}).items() if name in ("layer", "genes", "species")}
        return pd.concat([self._of_file(path, chosen) for path in model_input["path"].tolist()], ignore_index=True)

    def _of_file(self, path: str, params: dict[str, Any]) -> pd.DataFrame:
        if isinstance(self._model, api.CellEncoder):
            vectors_ND = self._model.embed(path, **params)
            with open_reader(path, params.get("layer", "X")) as reader:
                names = reader.cell_names(0, reader.num_rows)
            return pd.DataFrame({"path": path, "cell": list(names), "vector": vectors_ND.tolist()})
        found = self._model.annotate(path, **params)
        named = found.rename(columns=lambda column: column.removeprefix("mixgf_"))
        named = named.rename_axis("cell").reset_index()
        named.insert(0, "path", path)
        return named


set_model(ServedModel())
