"""Simple classifiers on frozen vectors of an encoder, alone or beside the cells' own principal components.

Vectors are read as `readings` has it: centred within each study, on one scale.

Shape letters: N training cells, M cells to predict, D width of a vector, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mixgf.arrays import Floats
from mixgf.classification import simple_classifiers
from mixgf.classification.models.baselines import balanced_regression, centred_by_types, neighbours, one
from mixgf.classification.models.protocol import EncoderModel, Fitted, Measured, Needs, Problem, counts_settings
from mixgf.classification.readings import Classifier, Member, fit_reading, values_of
from mixgf.classification.simple_classifiers import Head, Values


class FrozenModel(EncoderModel):
    """A classifier on frozen vectors; subclasses say which one (`classifier`)."""

    needs: ClassVar[Needs] = Needs.VECTORS

    def classifier(self, train_ND: Values, problem: Problem[Floats]) -> Head:
        """Fit on vectors that are centred and of length 1."""
        raise NotImplementedError

    def fit(self, problem: Problem[Floats]) -> Fitted[Floats]:
        reading = fit_reading(problem, "vectors")
        return one(reading, self.classifier(reading(problem.train), problem))

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Neighbours, alignment, and which vectors."""
        return {name: run["classify"][name] for name in ("knn", "align")} | {"embed": run["embed"]}


class Probe(FrozenModel):
    """Logistic regression; every type has the same weight in the loss."""

    head, label, seconds, chosen_on_public = "probe", "frozen + logistic probe", 0.3, True

    def classifier(self, train_ND: Values, problem: Problem[Floats]) -> Head:
        return balanced_regression(train_ND, problem)


class Neighbours(FrozenModel):
    """The nearest training cells by cosine vote with their labels.

    It stands for the paper's "zero-shot" setting (section 4.4), whose classifier the paper does not describe.
    """

    head, label = "knn", "frozen 5-NN (“zero-shot”)"

    def classifier(self, train_ND: Values, problem: Problem[Floats]) -> Head:
        return neighbours(train_ND, problem)


class Centroid(FrozenModel):
    """Nearest class mean by cosine."""

    head, label = "centroid", "frozen, nearest centroid"

    def classifier(self, train_ND: Values, problem: Problem[Floats]) -> Head:
        return simple_classifiers.nearest_centroid(train_ND, problem.labels, problem.num_classes)


class EncoderPca(EncoderModel):
    """Logistic regression on the encoder's vector beside 50 principal components of the training cells' variable genes.

    Each of the two is divided by the root of its mean squared length, so that both count alike. What it adds to `pca_logreg`, the
    same without the encoder, is what the encoder knows beyond the cells' own variation.
    """

    head, label, seconds = "encoder_pca", "frozen vector beside own PCA + logistic regression", 0.8
    chosen_on_public = True
    without: ClassVar[str] = "pca_logreg"
    by_types: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs.COUNTS_AND_VECTORS

    def fit(self, problem: Problem[Measured]) -> Fitted[Measured]:
        problem = centred_by_types(problem)
        readings = (
            fit_reading(problem, "expression", components=True, length="common"),
            fit_reading(problem, "vectors", length="common"),
        )
        head = balanced_regression(values_of(readings, problem.train), problem)
        made = Classifier(members=(Member(readings=readings, head=head),))
        return Fitted(predict=made, classifier=made)

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Settings of counts, and which vectors."""
        return counts_settings(run) | {"embed": run["embed"]}
