"""Predictions of the response to IFN-beta beside the measured one, in each type of blood cells (Kang et al. 2018).

    python jobs/score_ifn_beta.py pbmc_human_kang_ifnb.h5ad                 # predictions that need no encoder
    python jobs/score_ifn_beta.py pbmc_human_kang_ifnb.h5ad runs/isgf3      # and of an encoder: one folder for each type

The stimulus in one cell type stands for one perturbation of `mg.score_perturbations`, with the untreated cells of that type as control.
So 0 is the mean response of the other types, and 1 a replicate (the other half of the cells). `discrimination` asks whether a prediction
is nearer to its own type's response than to the others'. No gene was perturbed: that a prediction finds the right gene cannot be scored here.

| prediction | is |
|---|---|
| `none` | one random number per gene |
| `covariance` | correlation of each gene with the mean of STAT1, STAT2 and IRF9 (the complex that IFN-beta activates) in untreated cells |
| `CD14+ monocyte` | the measured response of these cells, for all other types |
| `encoder` | FOLDER/TYPE/perturb/responses.parquet: overexpression of STAT1+STAT2+IRF9, size of the effect on each gene (`change`, no sign) |

FOLDER/TYPE is the output of `mixgf perturb --set perturb.genes=STAT1+STAT2+IRF9 --set perturb.operations=overexpress --set
perturb.response=1500` on untreated cells of the type; spaces of its name are `_`. A gene in front moves all others by a rank, which is part
of `change`; so `change_same_rank` is empty.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from mixgf.perturbation import measured_effects
from mixgf.perturbation.expression import log_normalised
from mixgf.perturbation.measured_effects import Measured

TREATED, CONTROL = "IFN-beta 6h", "control"
ACTIVATED = ("STAT1", "STAT2", "IRF9")
FEWEST = 50
"""Fewest cells of a type in each condition."""


def measured(data: anndata.AnnData) -> Measured:
    """The response of each type with enough cells, relative to its own untreated cells."""
    counts = data.obs.groupby(["cell_type", "condition"], observed=True).size().unstack(fill_value=0)
    names = sorted(counts.index[counts.min(axis=1) >= FEWEST])
    by_type = []
    for name in names:
        mine = (data.obs["cell_type"] == name).to_numpy()
        by_type.append(
            measured_effects.measure(sparse.csr_matrix(data.X[mine]), data.obs["condition"][mine].to_numpy(), CONTROL)
        )
    stacked = {f: np.concatenate([getattr(m, f) for m in by_type]) for f in ("truth_PG", "replicate_PG", "fdr_PG")}
    return Measured(names=tuple(names), **stacked)


def covariance(data: anndata.AnnData, name: str) -> np.ndarray:
    """Correlation of each gene with the mean of `ACTIVATED` in the untreated cells of a type; NaN where a gene is absent."""
    mine = ((data.obs["cell_type"] == name) & (data.obs["condition"] == CONTROL)).to_numpy()
    x = log_normalised(sparse.csr_matrix(data.X[mine])).toarray()
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), np.nan)
    places = data.var_names.get_indexer(list(ACTIVATED))
    found = (x * np.nanmean(x[:, places], axis=1)[:, None]).mean(0)
    found[places] = np.nan
    return found


def encoder_effects(data: anndata.AnnData, folder: Path, name: str) -> np.ndarray:
    """Size of the effect of the overexpression on each gene, (G,); NaN = not in the matrix."""
    table = pd.read_parquet(folder / name.replace(" ", "_") / "perturb" / "responses.parquet")
    by_gene = table.groupby("responding_symbol", observed=True)["change"].mean()
    return by_gene.reindex(data.var_names).to_numpy(np.float64)


def main() -> None:
    """Print the scores of each prediction, means over the types."""
    data = anndata.read_h5ad(sys.argv[1])
    data = data[data.obs["condition"].isin([TREATED, CONTROL])].copy()
    truth = measured(data)
    own = np.full(len(truth.names), -1)
    rng = np.random.default_rng(0)
    monocyte = (truth.truth_PG + truth.replicate_PG)[truth.names.index("CD14+ monocyte")] / 2
    predictions = {
        "none": rng.normal(size=truth.truth_PG.shape),
        "covariance": np.stack([covariance(data, name) for name in truth.names]),
        "CD14+ monocyte": np.stack([np.full(data.n_vars, np.nan) if n == "CD14+ monocyte" else monocyte for n in truth.names]),
    }  # fmt: skip
    if len(sys.argv) > 2:
        folder = Path(sys.argv[2])
        predictions["encoder"] = np.stack([encoder_effects(data, folder, name) for name in truth.names])
    print(f"{len(truth.names)} types: {', '.join(truth.names)}")
    for name, predicted in predictions.items():
        scores = measured_effects.score(predicted, truth, own, signed=name != "encoder")
        means = measured_effects.summarise(scores.dropna(subset="value"))
        print(f"\n{name}\n{means.drop(columns='num_perturbations').round(3).to_string(index=False)}")


if __name__ == "__main__":
    main()
