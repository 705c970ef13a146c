"""Simple classifiers on frozen vectors of an encoder.

Between species, vectors are first z-scored within each species, as the features of the baselines are.

Shape letters: N training cells, M cells to predict, D width of a vector, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from mixgf.arrays import Floats
from mixgf.classification import simple_classifiers
from mixgf.classification.features import Scale
from mixgf.classification.models.protocol import CellSet, EncoderModel, Fitted, LinearClassifier, Needs, Problem
from mixgf.classification.simple_classifiers import Predictor


class FrozenModel(EncoderModel):
    """A classifier on frozen vectors; subclasses say which one (`classifier`)."""

    needs: ClassVar[Needs] = Needs.VECTORS

    def classifier(self, train_ND: Floats, problem: Problem[Floats]) -> Predictor:
        """Fit on vectors that are z-scored where species meet."""
        raise NotImplementedError

    def fit(self, problem: Problem[Floats]) -> Fitted[Floats]:
        train = problem.train
        scale = Scale.fit(train.x, train.species) if problem.across else None

        def scaled(cells: CellSet[Floats]) -> Floats:
            return cells.x if scale is None else scale(cells.x, cells.species)

        predict = self.classifier(scaled(train), problem)
        linear = (lambda: self.linear(problem)) if self.can_keep else None
        return Fitted(predict=lambda cells: predict(scaled(cells)), linear=linear)

    def linear(self, problem: Problem[Floats]) -> LinearClassifier:
        """The same as a linear layer, where there is one (`can_keep`)."""
        raise NotImplementedError

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Neighbours, and which vectors."""
        return {"knn": run["classify"]["knn"], "embed": run["embed"]}


class Probe(FrozenModel):
    """Logistic regression on z-scored vectors."""

    head, label, seconds, can_keep = "probe", "frozen + logistic probe", 0.3, True

    def classifier(self, train_ND: Floats, problem: Problem[Floats]) -> Predictor:
        scale = Scale.fit(train_ND)
        predict = simple_classifiers.logistic_regression(scale(train_ND), problem.labels, problem.num_classes)
        return lambda values_MD: predict(scale(values_MD))

    def linear(self, problem: Problem[Floats]) -> LinearClassifier:
        """Fitted without the validation cells, on which its temperature and limits are fitted."""
        learning, labels = problem.learning.x, problem.labels[~problem.is_validation]
        head_CD, bias_C = simple_classifiers.scaled_logistic_layer(learning, labels, problem.num_classes)
        return LinearClassifier(
            encoder=problem.load_encoder(), head_CD=head_CD, bias_C=bias_C,
            genes_CV=np.zeros((problem.num_classes, 0)), layer=problem.config.embed.layer, max_len=0,
            vectors_ND=np.concatenate([learning, problem.validation.x, problem.target.x]),
        )  # fmt: skip


class Neighbours(FrozenModel):
    """The nearest training cells by cosine vote with their labels.

    It stands for the paper's "zero-shot" setting (section 4.4), whose classifier the paper does not describe.
    """

    head, label = "knn", "frozen 5-NN (“zero-shot”)"

    def classifier(self, train_ND: Floats, problem: Problem[Floats]) -> Predictor:
        return simple_classifiers.nearest_neighbours(
            train_ND, problem.labels, problem.num_classes, number=problem.config.classify.knn, metric="cosine"
        )


class Centroid(FrozenModel):
    """Nearest class mean by cosine."""

    head, label = "centroid", "frozen, nearest centroid"

    def classifier(self, train_ND: Floats, problem: Problem[Floats]) -> Predictor:
        return simple_classifiers.nearest_centroid(train_ND, problem.labels, problem.num_classes)
