"""Models on raw counts, or on sentences without an encoder, scored on the same splits as the encoder's models.

Genes, scales, components and weights are fitted on training cells only; a model that also reads the counts of the cells to predict
says so. Between species, counts are in the space of one-to-one orthologs, between data sets in that of the genes that all of them
detect. `readings` has how cells become vectors, and what is subtracted from a study without training cells.

Shape letters: N training cells, M cells to predict, G genes, H chosen genes, C classes, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

from mixgf.arrays import Floats, Ints, Names
from mixgf.classification import linear_start, simple_classifiers
from mixgf.classification.adapted_centroids import adapted_centroids
from mixgf.classification.features import Scale, log_normalise, principal_components, rank_scores, variable_genes
from mixgf.classification.models.protocol import (
    CellSet,
    CountMatrix,
    CountsModel,
    Fitted,
    Model,
    Needs,
    Problem,
    SentenceSet,
)
from mixgf.classification.readings import Align, Classifier, Member, Reading, align_of, fit_reading
from mixgf.classification.simple_classifiers import CentroidHead, Head
from mixgf.classification.species_alignment import align_scores, is_new_study, read_as, shared_tokens_of
from mixgf.corpus.packed import truncate


def one(reading: Reading, head: Head) -> Fitted[Any]:
    """A model with one reading and one head."""
    made = Classifier(members=(Member(readings=(reading,), head=head),))
    return Fitted(predict=made, classifier=made)


def centred_by_types(problem: Problem[Any]) -> Problem[Any]:
    """The problem in which every reading of expression centres a study without training cells by types."""
    return problem if problem.by_types else replace(problem, by_types=True)


class Majority(CountsModel):
    """Every cell gets the class frequencies of the training cells."""

    head, label, can_keep = "majority", "majority class", False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        shares_C = np.bincount(problem.labels, minlength=problem.num_classes) / len(problem.labels)
        return Fitted(predict=lambda cells: np.tile(shares_C, (cells.x.shape[0], 1)))


class HvgLogisticRegression(CountsModel):
    """Logistic regression (C = 1) on log-normalised, z-scored variable genes: the usual baseline of published comparisons."""

    head, label, seconds = "hvg_logreg", "z-scored genes + logistic regression", 0.5

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        reading = fit_reading(problem, "expression", z_scores=True, length="none")
        head = simple_classifiers.logistic_regression(reading(problem.train), problem.labels, problem.num_classes)
        return one(reading, head)


class GenesLogisticRegression(CountsModel):
    """Logistic regression on variable genes on one scale; cells have length 1, and every type the same weight in the loss.

    A study without training cells is centred by types (`study_shift`).
    """

    head, label, seconds, by_types = "genes_logreg", "genes on one scale + logistic regression", 0.5, True
    chosen_on_public = True

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        problem = centred_by_types(problem)
        reading = fit_reading(problem, "expression")
        return one(reading, balanced_regression(reading(problem.train), problem))


class PcaNeighbours(CountsModel):
    """K nearest neighbours by cosine on 50 principal components of log-normalised variable genes, without z-scores."""

    head, label, seconds = "pca_knn", "PCA + 5-NN", 0.4
    joint: ClassVar[bool] = False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        reading = fit_reading(problem, "expression", components=True, joint=self.joint)
        return one(reading, neighbours(reading(problem.train), problem))


class JointPcaNeighbours(PcaNeighbours):
    """The same on principal components of training cells and cells to predict, each study centred on its own mean.

    Cells to predict are seen without their labels.
    """

    head, label, seconds, joint = "joint_pca", "joint PCA + 5-NN (unlabelled test cells seen)", 0.6, True


class JointPcaCentroid(CountsModel):
    """Nearest class mean by cosine on components of training cells and cells to predict: the baseline where labels are few.

    The variable genes are of both too. Cells to predict are seen without their labels.
    """

    head, label, seconds = "joint_pca_centroid", "joint PCA + centroid (unlabelled test cells seen)", 0.6

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        reading = fit_reading(problem, "expression", components=True, joint=True, joint_genes=True)
        head = simple_classifiers.nearest_centroid(reading(problem.train), problem.labels, problem.num_classes)
        return one(reading, head)


class PcaLogisticRegression(CountsModel):
    """Logistic regression on 50 principal components of variable genes: `encoder_pca` without the encoder.

    A study without training cells is centred by types (`study_shift`).
    """

    head, label, seconds, by_types = "pca_logreg", "PCA + logistic regression", 0.5, True
    chosen_on_public = True

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        problem = centred_by_types(problem)
        reading = fit_reading(problem, "expression", components=True, length="common")
        return one(reading, balanced_regression(reading(problem.train), problem))


class RankPca(CountsModel):
    """Normal scores of ranks within the cell (variable genes), 50 principal components, logistic regression."""

    head, label, seconds, can_keep = "rank_pca", "rank z-scores + PCA", 1.2, False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        genes = variable_genes(log_normalise(problem.train.x), problem.config.classify.num_hvgs)
        train_NH, studies = (
            rank_scores(problem.train.x, genes),
            np.union1d(problem.train.studies, problem.target.studies),
        )
        within = Scale.fit(train_NH, problem.train.studies)
        several = len(studies) > 1 and align_of(problem) is Align.OWN_MEAN

        def scaled(ranks_MH: Floats, studies_M: Names) -> Floats:
            return within(ranks_MH, studies_M) if several else ranks_MH

        train_NH = scaled(train_NH, problem.train.studies)
        mean_H, components = train_NH.mean(0), principal_components(train_NH, problem.seed())
        train_NK = (train_NH - mean_H) @ components
        scale = Scale.fit(train_NK)
        head = simple_classifiers.logistic_regression(scale(train_NK), problem.labels, problem.num_classes)
        return Fitted(
            predict=lambda cells: head(
                scale((scaled(rank_scores(cells.x, genes), cells.studies) - mean_H) @ components)
            )
        )


class Pseudobulk(CountsModel):
    """Nearest class mean, by cosine, on log-normalised, z-scored variable genes."""

    head, label, seconds = "pseudobulk", "nearest pseudobulk", 0.3

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        reading = fit_reading(problem, "expression", z_scores=True)
        head = simple_classifiers.nearest_centroid(reading(problem.train), problem.labels, problem.num_classes)
        return one(reading, head)


class GenesVote(CountsModel):
    """Mean probability of `genes_logreg` and `pseudobulk`: they fail in different cells.

    The probabilities of `pseudobulk` are sharper here (`TEMPERATURE`), so that neither of the two decides alone. In both, a study
    without training cells is centred by types (`study_shift`). For such a study, `pseudobulk` shares its half of the vote with two
    nearest class means, on z-scored genes and on one scale. These moved towards the cells of the study (`adapted_centroids`).
    """

    TEMPERATURE: ClassVar[float] = 0.05
    """Of the cosines (`CentroidHead`)."""

    head, label, seconds, by_types = "genes_vote", "regression and pseudobulk, mean of both", 0.8, True
    chosen_on_public = True

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        problem = centred_by_types(problem)
        regression, bulk = (self._member(kind(), problem) for kind in (GenesLogisticRegression, Pseudobulk))
        made = Classifier(members=(regression, bulk))
        new_M = ~np.isin(problem.target.studies, problem.train.studies)
        if align_of(problem) is Align.OWN_MEAN and new_M.any():
            study = problem.target[new_M]
            said_M = made(study).argmax(1)
            centroids = (bulk, *(self._adapted(one.readings[0], problem, study, said_M) for one in (bulk, regression)))
            shared = tuple(replace(member, weight=1 / len(centroids)) for member in centroids)
            made = Classifier(members=(regression, *shared))
        return Fitted(predict=made, classifier=made)

    def _member(self, model: CountsModel, problem: Problem[CountMatrix]) -> Member:
        """The only member of a model, with the temperature of this one."""
        fitted = model.fit(problem).classifier
        assert fitted is not None, "a model to keep has arrays"
        (member,) = fitted.members
        head = member.head
        return (
            replace(member, head=replace(head, temperature=self.TEMPERATURE))
            if isinstance(head, CentroidHead)
            else member
        )

    def _adapted(
        self, reading: Reading, problem: Problem[CountMatrix], study: CellSet[CountMatrix], said_M: Ints
    ) -> Member:
        """Nearest class mean in a reading, with means that moved towards the cells of a study."""
        train_NH, study_MH = np.asarray(reading(problem.train)), np.asarray(reading(study))
        head = adapted_centroids(
            train_NH, problem.labels, study_MH, said_M, problem.num_classes, temperature=self.TEMPERATURE
        )
        return Member(readings=(reading,), head=head)


@dataclass(frozen=True)
class GenesRanks(Model):
    """The convex start of `finetune_linear_start` without the encoder: regression on the genes of the sentence and their ranks.

    Between species it reads one-to-one orthologs. Scores of a study without training cells are shifted to those of the training
    cells (`species_alignment.align_scores`), as those of fine-tuned models are.
    """

    head, label, seconds = "genes_ranks", "gene ranks + logistic regression", 1.0
    chosen_on_public = True
    needs: ClassVar[Needs] = Needs.SENTENCES

    @property
    def encoder(self) -> None:
        """None."""
        return

    def reads(self, run: dict[str, Any]) -> dict[str, Any]:
        """Length of sentences and alignment."""
        settings = {name: run["classify"][name] for name in ("align", "max_len")}
        return settings | ({"orthologs": run["vocab"]["orthologs"]} if settings["align"] else {})

    def fit(self, problem: Problem[SentenceSet]) -> Fitted[SentenceSet]:
        settings, shared_V = problem.config.classify, shared_tokens_of(problem)

        def ranks(cells: CellSet[SentenceSet]) -> sparse.csr_matrix:
            read = truncate(*read_as(cells.x.corpus.tokens(cells.x.cells), shared_V), settings.max_len)
            return linear_start.gene_rows(*read, cells.x.corpus.vocabulary.size)

        start = linear_start.fit_best(
            np.zeros((len(problem.labels), 0)), ranks(problem.train), problem.labels, problem.num_classes,
            seed=problem.seed(1), shares=(1.0,),
        )  # fmt: skip
        head = simple_classifiers.LinearHead(start.genes_CV, start.bias_C)
        made = Classifier(members=(Member(readings=(Reading(raw="ranks"),), head=head),))
        return Fitted(
            predict=aligned(lambda cells: head(ranks(cells)), problem), classifier=made, max_len=settings.max_len
        )


def aligned(predict: Any, problem: Problem[Any]) -> Any:
    """Predictions whose scores are shifted where no cell of the studies to predict has trained (`classify.align`)."""
    if not is_new_study(problem):
        return predict
    own_NC = predict(problem.train)
    return lambda cells: align_scores(predict(cells), own_NC, problem.labels)


def neighbours(train_NK: Floats, problem: Problem[Any]) -> simple_classifiers.NeighbourHead:
    """The `classify.knn` nearest training cells by cosine."""
    return simple_classifiers.nearest_neighbours(
        train_NK, problem.labels, problem.num_classes, number=problem.config.classify.knn
    )


def balanced_regression(train_NH: Floats, problem: Problem[Any]) -> simple_classifiers.LinearHead:
    """Logistic regression for cells of length 1 with the same weight for every class."""
    return simple_classifiers.logistic_regression(
        train_NH, problem.labels, problem.num_classes, strength=simple_classifiers.STRENGTH, balanced=True
    )
