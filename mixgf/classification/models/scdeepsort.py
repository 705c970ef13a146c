"""scDeepSort (Shao et al. 2021, named in Table 2 of the paper): a graph network over cells and genes with learned edge confidences.

Genes and cells are nodes. An edge joins a cell and a gene that it expresses. Its weight is the expression, scaled so that the
weights of a cell's edges have mean 1. Genes start from principal components of their expression over the training cells,
cells from the mean of their genes, weighted by expression. A layer is

    h_i = relu(W (sum_j a_j w_ij x_j + b x_i) / (1 + number of genes of i))

with a confidence a_j of each gene's edges and b of the self loop; both start at 1 and are learned. A linear layer reads h_i.

With one layer, as published, only edges from genes to cells carry messages. So a batch needs no cells but its own, and new
cells are predicted without training again.

Sizes and rates are those of the authors' program, as far as known: 400 components, 200 hidden units, one layer, dropout .1. Adam has
rate .001 and decay .0005. Batches have 500 cells. Of 300 epochs the one with the best validation accuracy is taken. It departs
from the program in four points. Of epochs with equal accuracy the one with the lowest loss is taken, and training stops after `PATIENCE`
epochs without a better one. Dropout acts on the sum over genes, not on
each gene. Components are divided by one number, so that they have variance 1. There is no threshold below which a cell
is left without a type.

Shape letters: N training cells, M cells, B cells of a batch, G genes, D components, H hidden units, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn

from mixgf.arrays import Bools, Floats, Ints
from mixgf.classification.features import log_normalise
from mixgf.classification.models.protocol import CellSet, CountMatrix, CountsModel, Fitted, Problem

NUM_COMPONENTS, HIDDEN, DROPOUT = 400, 200, 0.1
RATE, DECAY, BATCH, EPOCHS = 1e-3, 5e-4, 500, 300
PATIENCE = 50
"""Epochs without a better one after which training stops."""


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges from genes to some cells."""

    weights_MG: sparse.csr_matrix
    """float32: weight of each edge, divided by 1 + the cell's number of genes."""
    loops_M: Floats
    """Weight of each self loop, divided likewise."""
    shares_MG: sparse.csr_matrix
    """float32: expression of each gene as a share of the cell's."""

    @classmethod
    def of(cls, counts: CountMatrix) -> Edges:
        """Edges of cells with raw counts (M, G). A cell without counts has its self loop only."""
        values = sparse.csr_matrix(log_normalise(counts), dtype=np.float32)
        values.eliminate_zeros()
        num_M = np.diff(values.indptr).astype(np.float32)
        total_M = np.asarray(values.sum(1)).ravel()
        shares = sparse.csr_matrix(sparse.diags(1 / np.maximum(total_M, 1e-6)) @ values, dtype=np.float32)
        scaled = sparse.csr_matrix(sparse.diags(num_M / (num_M + 1)) @ shares, dtype=np.float32)
        return cls(scaled, (1 / (num_M + 1)).astype(np.float32), shares)


class _Gather(torch.autograd.Function):
    """Sum over genes of edge weight x value, (B, D); the gradient flows to the values only."""

    @staticmethod
    def forward(ctx: Any, values_GD: Tensor, weights_BG: sparse.csr_matrix) -> Tensor:
        ctx.weights = weights_BG
        return torch.from_numpy(weights_BG @ values_GD.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.weights.T @ gradients[0].numpy()), None


class GraphNetwork(nn.Module):
    """One layer of messages from genes to cells, and a linear layer of classes."""

    genes_GD: Tensor

    def __init__(self, genes_GD: Floats, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("genes_GD", torch.from_numpy(np.asarray(genes_GD, dtype=np.float32)))
        self.gene_confidence_G = nn.Parameter(torch.ones(len(genes_GD), 1))
        self.loop_confidence = nn.Parameter(torch.ones(1))
        self.messages: nn.Linear = nn.utils.skip_init(nn.Linear, genes_GD.shape[1], HIDDEN)  # type: ignore[no-untyped-call]
        self.classes: nn.Linear = nn.utils.skip_init(nn.Linear, HIDDEN, num_classes)  # type: ignore[no-untyped-call]
        for layer in (self.messages, self.classes):
            nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("relu"), generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, weights_BG: sparse.csr_matrix, loops_B: Tensor, cells_BD: Tensor) -> Tensor:
        """Class scores (B, C)."""
        sums_BD: Tensor = _Gather.apply(self.genes_GD * self.gene_confidence_G, weights_BG)  # type: ignore[no-untyped-call]
        sums_BD = sums_BD + self.loop_confidence * loops_B[:, None] * cells_BD
        if self.training:
            kept_BD = torch.rand(sums_BD.shape, generator=self.generator) >= DROPOUT
            sums_BD = sums_BD * kept_BD / (1 - DROPOUT)
        return self.classes(torch.relu(self.messages(sums_BD)))


class ScDeepSort(CountsModel):
    """A weighted cell-gene graph network: see the module. It reads all genes, and no cell to predict takes part in training."""

    head, label, seconds, can_keep = "scdeepsort", "scDeepSort (cell-gene graph network)", 60.0, False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        edges = Edges.of(problem.train.x)
        learns_N = ~problem.is_validation
        components_GD = gene_components(problem.train.x[learns_N], problem.seed(1))
        generator = torch.Generator().manual_seed(problem.seed(2))
        network = GraphNetwork(components_GD, problem.num_classes, generator)
        epoch = _train(network, edges, problem.labels, learns_N, np.random.default_rng(problem.seed(3)))

        def predict(cells: CellSet[CountMatrix]) -> Floats:
            return probabilities(network, Edges.of(cells.x))

        return Fitted(predict=predict, notes={"epoch": epoch})


def gene_components(counts: CountMatrix, seed: int) -> Floats:
    """Principal components of genes over cells, float32 (G, D) of variance 1 in all; 0 for a gene without counts."""
    values_GN = sparse.csr_matrix(log_normalise(counts).T)
    few = max(1, min(NUM_COMPONENTS, min(values_GN.shape) - 1))
    found_GD = TruncatedSVD(few, random_state=seed, n_iter=4).fit_transform(values_GN).astype(np.float32)
    return np.asarray(found_GD / max(float(found_GD.std()), 1e-9), dtype=np.float32)


def _train(network: GraphNetwork, edges: Edges, labels_N: Ints, learns_N: Bools, rng: np.random.Generator) -> int:
    """Train on the cells of `learns_N`, keep the epoch with the best accuracy on the others; returns its number."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, weight_decay=DECAY)
    cells_ND = torch.from_numpy(edges.shares_MG @ network.genes_GD.numpy())
    loops_N, classes_N = torch.from_numpy(edges.loops_M), torch.from_numpy(labels_N)
    validation, best, chosen = np.flatnonzero(~learns_N), (-1.0, 0.0), 0
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    for epoch in range(1, EPOCHS + 1):
        network.train()
        order = rng.permutation(np.flatnonzero(learns_N))
        for rows in np.array_split(order, max(1, -(-len(order) // BATCH))):
            scores_BC = network(edges.weights_MG[rows], loops_N[rows], cells_ND[rows])
            loss = nn.functional.cross_entropy(scores_BC, classes_N[rows], reduction="sum")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        network.eval()
        if not len(validation):
            chosen = epoch
            continue
        with torch.no_grad():
            scores = network(edges.weights_MG[validation], loops_N[validation], cells_ND[validation])
        right = float((scores.argmax(1) == classes_N[validation]).float().mean())
        found = (right, -float(nn.functional.cross_entropy(scores, classes_N[validation])))
        if found > best:
            best, chosen = found, epoch
            kept = {name: value.clone() for name, value in network.state_dict().items()}
        elif epoch - chosen >= PATIENCE:
            break
    if len(validation):
        network.load_state_dict(kept)
    return chosen


def probabilities(network: GraphNetwork, edges: Edges) -> Floats:
    """Class probabilities (M, C)."""
    with torch.no_grad():
        cells_MD = torch.from_numpy(edges.shares_MG @ network.genes_GD.numpy())
        scores_MC = network(edges.weights_MG, torch.from_numpy(edges.loops_M), cells_MD).double()
    return np.asarray(torch.softmax(scores_MC, dim=1).numpy())
