"""scDeepSort: edges and messages against the formula with dense matrices, the gradient of confidences, the choice of the epoch."""

from dataclasses import replace

import numpy as np
import torch
from scipy import sparse

from mixgf.classification.features import log_normalise
from mixgf.classification.models import scdeepsort
from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.classification.models.scdeepsort import Edges, GraphNetwork, ScDeepSort
from mixgf.config.classification import Classify
from mixgf.config.run import Config


def problem(seed: int = 0) -> tuple[Problem[sparse.csr_matrix], np.ndarray]:
    """Three types of 60 cells; each has ten genes that are five times as high. 120 cells train, 24 of them validate."""
    rng = np.random.default_rng(seed)
    labels = np.arange(180) % 3
    mean = np.where(np.arange(60) // 10 == labels[:, None], 5.0, 1.0)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    made = Problem(
        config=Config(classify=Classify(num_hvgs=60)), train=CellSet(counts[:120], np.full(120, "human")), labels=labels[:120],
        num_classes=3, is_validation=np.arange(120) < 24, target=CellSet(counts[120:], np.full(60, "human")),
    )  # fmt: skip
    return made, labels[120:]


def test_scores_are_those_of_the_formula_on_dense_matrices() -> None:
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.8, (5, 12)).astype(np.float32))
    counts[4] = 0  # a cell without counts
    counts.eliminate_zeros()
    genes = rng.normal(size=(12, 4)).astype(np.float32)
    network = GraphNetwork(genes, 3, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        network.gene_confidence_G += torch.from_numpy(rng.normal(size=(12, 1)).astype(np.float32))
        network.loop_confidence += 0.7
    edges = Edges.of(counts)
    found = scdeepsort.probabilities(network, edges)

    expression = log_normalise(counts).toarray()
    confidence, loop = network.gene_confidence_G.detach().numpy()[:, 0], float(network.loop_confidence.detach())
    messages, classes = network.messages, network.classes
    for i in range(5):
        on = expression[i] > 0
        weights = (
            expression[i] / expression[i][on].mean() if on.any() else expression[i]
        )  # of mean 1 over the cell's edges
        own = (expression[i] / max(expression[i].sum(), 1e-6)) @ genes
        summed = ((confidence * weights) @ genes + loop * own) / (1 + on.sum())
        hidden = np.maximum(messages.weight.detach().numpy() @ summed + messages.bias.detach().numpy(), 0)
        scores = classes.weight.detach().numpy() @ hidden + classes.bias.detach().numpy()
        np.testing.assert_allclose(found[i], np.exp(scores) / np.exp(scores).sum(), rtol=1e-4)


def test_the_gradient_of_a_confidence_is_its_numerical_slope() -> None:
    rng = np.random.default_rng(1)
    edges = Edges.of(sparse.csr_matrix(rng.poisson(0.8, (6, 9)).astype(np.float32)))
    network = GraphNetwork(rng.normal(size=(9, 4)).astype(np.float32), 3, torch.Generator().manual_seed(0)).eval()
    rows = torch.from_numpy(edges.shares_MG @ network.genes_GD.numpy())

    def loss() -> torch.Tensor:
        scores = network(edges.weights_MG, torch.from_numpy(edges.loops_M), rows)
        return torch.nn.functional.cross_entropy(scores, torch.arange(6) % 3)

    loss().backward()
    for parameter in (network.gene_confidence_G, network.loop_confidence):
        k = 0
        with torch.no_grad():
            parameter.view(-1)[k] += 1e-2
            up = float(loss())
            parameter.view(-1)[k] -= 2e-2
            down = float(loss())
            parameter.view(-1)[k] += 1e-2
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.view(-1)[k], (up - down) / 2e-2, rtol=0.05, atol=1e-5)


def test_types_are_told_apart_with_the_same_numbers_each_time_and_torch_keeps_its_own_random_numbers() -> None:
    made, true = problem()
    before = torch.random.get_rng_state()
    fitted = ScDeepSort().fit(made)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = fitted.predict(made.target)
    assert (found.argmax(1) == true).mean() > 0.9
    np.testing.assert_array_equal(ScDeepSort().fit(made).predict(made.target), found)
    np.testing.assert_allclose(
        fitted.predict(made.target[[3, 8]]), found[[3, 8]], atol=1e-6
    )  # whoever is tested beside it


def test_validation_cells_choose_the_epoch_and_do_not_train(monkeypatch) -> None:
    made, _ = problem()
    monkeypatch.setattr(scdeepsort, "EPOCHS", 100)
    monkeypatch.setattr(scdeepsort, "PATIENCE", 30)
    wrong = made.labels.copy()
    wrong[:24] = (wrong[:24] + 1) % 3  # the more the network learns, the worse it is on these
    deceived, trained = ScDeepSort().fit(replace(made, labels=wrong)), ScDeepSort().fit(made)
    assert deceived.notes["epoch"] < trained.notes["epoch"]
    right = [(one.predict(made.train[:24]).argmax(1) == made.labels[:24]).mean() for one in (deceived, trained)]
    assert right[0] < 0.6
    assert right[1] > 0.8
    everything = replace(made, is_validation=np.zeros(120, dtype=bool))
    assert ScDeepSort().fit(everything).notes["epoch"] == 100
