"""The shift of another study: found without its labels, whatever its shares of types; none where there is nothing to see."""

from dataclasses import replace

import numpy as np
import pytest
from invented_studies import PLATFORM, TYPES, cells, problem

from mixgf.classification import study_shift
from mixgf.classification.features import log_normalise
from mixgf.classification.models.baselines import GenesLogisticRegression, PcaNeighbours

RNG = np.random.default_rng(0)


def test_the_shift_is_that_of_the_types_whatever_the_shares_of_types() -> None:
    """The mean over types of the difference, by the true labels, less what types do not share; the difference of means is another."""
    target, labels = cells((150, 20, 10), PLATFORM)
    made = problem(target)
    found = study_shift.shifts(made)["human new"]
    old, new = log_normalise(made.train.x).toarray(), log_normalise(target).toarray()
    types = np.stack([new[labels == c].mean(0) - old[made.labels == c].mean(0) for c in range(TYPES)])
    share = study_shift.common_share(types)
    assert 0.5 < share < 1
    np.testing.assert_allclose(found, share * types.mean(0), atol=1e-5)
    assert np.abs(found - (new.mean(0) - old.mean(0))).max() > 0.2


@pytest.mark.parametrize("sizes", [(60, 60, 60), (150, 10, 0)])
def test_a_model_that_centres_by_types_labels_another_study(sizes: tuple[int, ...]) -> None:
    target, labels = cells(sizes, PLATFORM)
    made = problem(target)
    said = GenesLogisticRegression().fit(made).predict(made.target).argmax(1)
    assert (said == labels).mean() > 0.95


def test_unequal_shares_mislead_a_model_that_centres_on_the_own_mean_and_no_other() -> None:
    target, labels = cells((180, 6, 0), PLATFORM)
    made = problem(target)
    own = PcaNeighbours().fit(made).predict(made.target).argmax(1)
    by_types = replace(made, by_types=True)
    typed = PcaNeighbours().fit(by_types).predict(made.target).argmax(1)
    assert (typed == labels).mean() > 0.95 > (own == labels).mean()


def test_noise_has_no_share_in_common_and_a_shift_has_all() -> None:
    noise = RNG.normal(size=(6, 4_000))
    assert study_shift.common_share(noise) < 0.1
    assert study_shift.common_share(np.tile(noise[0], (6, 1))) == pytest.approx(1)
    assert study_shift.common_share(noise + 1) == pytest.approx(1 / (1 + 1 / 6), abs=0.02)
    assert study_shift.common_share(noise[:1]) == 0


def test_a_known_study_and_a_config_without_alignment_have_no_shift() -> None:
    target, _ = cells((40, 40, 40), PLATFORM)
    assert study_shift.shifts(problem(target, study="old")) == {}
    reading = GenesLogisticRegression().fit(problem(target, align=False)).classifier.members[0].readings[0]
    assert set(reading.centres) == {"human old"}


def test_no_classifier_of_types_is_fitted_without_a_new_study(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = cells((40, 40, 40), PLATFORM)
    fitted = []
    kind = study_shift._Types
    monkeypatch.setattr(study_shift, "_Types", lambda *args: fitted.append(1) or kind(*args))
    GenesLogisticRegression().fit(problem(target, study="old"))
    assert not fitted
    GenesLogisticRegression().fit(problem(target))
    assert fitted
