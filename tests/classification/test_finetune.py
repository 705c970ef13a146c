"""Fine-tuning and frozen classifiers: test cells decide nothing, dropout depends on seed, epoch and cell, freezing freezes, hand-worked heads."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import special

from mixgf.classification import encoders, finetune, linear_start, registry, species_alignment
from mixgf.classification.finetune import Classifier, Tuned
from mixgf.classification.labels import Labelled, labelled
from mixgf.classification.models import finetuned
from mixgf.classification.models.protocol import Problem, SentenceSet, problem_of
from mixgf.classification.splits import Split, make
from mixgf.config.classification import HEADS, Classify
from mixgf.config.data import Tokens, Vocab
from mixgf.config.run import Config
from mixgf.config.training import Model, Train
from mixgf.corpus import packed
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed, lora
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.genes.vocabulary import NUM_SPECIALS
from mixgf.rng import dropout_keys, dropped, hashed
from mixgf.training import worker_group

CELLS = 90
SMALL = Model(num_layers=2, dim=32, num_heads=2, ffn_dim=64, max_positions=32)


@pytest.fixture(scope="module")
def corpus(make_corpus) -> Corpus:
    """Every other cell has genes of its own kind, so that types can be told apart."""
    rng = np.random.default_rng(0)
    return Corpus(make_corpus(rng.integers(5, 20, CELLS), np.arange(CELLS) % 2, [40, 50]))


def table(labels: np.ndarray | None = None) -> Labelled:
    same = np.full(CELLS, "x")
    names = np.array([f"c{i}" for i in range(CELLS)])
    labels = np.array(["even", "odd"])[np.arange(CELLS) % 2] if labels is None else labels
    return Labelled(cells=np.arange(CELLS), names=names, labels=labels, species=same, groups=same, donors=same, datasets=same,
                    transfer=same, sources=same)  # fmt: skip


RUN = Config(
    model=SMALL,
    tokens=Tokens(max_len=32),
    train=Train(micro_tokens=100),
    classify=Classify(epochs=3, lr=3e-3, warmup_steps=5, splits=("random",)),
)


def only_split(data: Labelled) -> Split:
    return make(data, RUN.classify, seed=0)[0]


def problem(corpus: Corpus, data: Labelled, split: Split, run: Config = RUN) -> Problem[SentenceSet]:
    train, target = (SentenceSet(corpus, data.cells[rows]) for rows in (split.train, split.test))
    return problem_of(data, split, run, train, target)


@dataclass
class Found:
    """A fine-tuning and its probabilities of the test cells."""

    tuned: Tuned
    probabilities: np.ndarray


def tuned(
    corpus: Corpus, data: Labelled, split: Split, run: Config = RUN, encoder: Encoder | None = None
) -> Found:  # fmt: skip
    made, encoder = problem(corpus, data, split, run), encoder or Encoder(SMALL, corpus.vocabulary.size)
    found = finetune.finetune(encoder, made, config=run, context=worker_group.LocalContext())
    return Found(found, found.predict(made.target.x.cells))


@pytest.fixture(scope="module")
def base(corpus: Corpus) -> Found:
    return tuned(corpus, table(), only_split(table()))


def test_fine_tuning_learns_types_that_can_be_told_apart(base: Found) -> None:
    split = only_split(table())
    true = split.ids(table().labels[split.test])
    assert base.probabilities.shape == (len(split.test), 2)
    np.testing.assert_allclose(base.probabilities.sum(1), 1, atol=1e-9)
    assert (base.probabilities.argmax(1) == true).mean() >= 0.9
    assert [row["epoch"] for row in base.tuned.history] == [1, 2, 3]
    assert base.tuned.history[-1]["train_loss"] < base.tuned.history[0]["train_loss"]


def test_labels_of_test_cells_decide_nothing(corpus: Corpus, base: Found) -> None:
    data, split = table(), only_split(table())
    labels = data.labels.copy()
    labels[split.test] = labels[np.random.default_rng(5).permutation(split.test)]
    assert (labels != data.labels).any()
    other = tuned(corpus, replace(data, labels=labels), split)
    assert (other.tuned.epoch, other.tuned.history) == (base.tuned.epoch, base.tuned.history)
    np.testing.assert_array_equal(other.probabilities, base.probabilities)


def test_which_cells_are_tested_decides_nothing(corpus: Corpus, base: Found) -> None:
    split = only_split(table())
    few = replace(split, test=split.test[::3])
    other = tuned(corpus, table(), few)
    assert other.tuned.history == base.tuned.history
    np.testing.assert_array_equal(other.probabilities, base.probabilities[::3])


def noise() -> Labelled:
    """Labels that mean nothing, so that training on is worse than stopping."""
    return table(np.where(np.random.default_rng(3).random(CELLS) < 0.5, "even", "odd"))


OVERFITS = replace(RUN, classify=replace(RUN.classify, epochs=5, lr=0.01))


def test_the_epoch_with_the_lowest_validation_loss_is_chosen(corpus: Corpus) -> None:
    found = tuned(corpus, noise(), only_split(noise()), OVERFITS)
    assert found.tuned.epoch == int(np.argmin([row["loss"] for row in found.tuned.history])) + 1
    assert found.tuned.epoch < 5  # so that the choice can be seen at all


def test_the_chosen_weights_predict(corpus: Corpus) -> None:
    """Tested on the validation cells, the loss of the returned probabilities is the lowest of the history."""
    data, split = noise(), only_split(noise())
    found = tuned(corpus, data, replace(split, test=split.validation), OVERFITS)
    true = split.ids(data.labels[split.validation])
    loss = -np.log(found.probabilities[np.arange(len(true)), true].clip(1e-12)).mean()
    assert loss == pytest.approx(min(row["loss"] for row in found.tuned.history), abs=1e-12)


def test_warm_up_is_at_most_a_quarter_of_the_steps(corpus: Corpus, base: Found) -> None:
    assert (base.tuned.warmup_steps, base.tuned.num_steps) == (5, 3 * 8)  # 64 training cells in batches of 8
    run = replace(RUN, classify=replace(RUN.classify, epochs=1, warmup_steps=500))
    found = tuned(corpus, table(), only_split(table()), run)
    assert (found.tuned.warmup_steps, found.tuned.num_steps) == (2, 8)


def test_another_seed_gives_another_model(corpus: Corpus, base: Found) -> None:
    other = tuned(corpus, table(), only_split(table()), replace(RUN, seed=1))
    assert not np.array_equal(other.probabilities, base.probabilities)


def test_class_weights_count_every_class_alike(corpus: Corpus) -> None:
    """With inverse frequencies the weighted first loss of an untrained head is near log C whatever the class sizes."""
    labels = np.array(["rare" if i % 9 == 0 else "common" for i in range(CELLS)])
    data = table(labels)
    run = replace(RUN, classify=replace(RUN.classify, class_weights=True, epochs=1, lr=1e-9))
    found = tuned(corpus, data, only_split(data), run)
    assert found.tuned.history[0]["train_loss"] == pytest.approx(np.log(2), rel=0.1)


@pytest.mark.parametrize(("layers", "trained"), [(0, {0, 1, "embedding"}), (1, {1}), (2, set()), ("all", set())])
def test_frozen_layers_do_not_move(corpus: Corpus, layers: int | str, trained: set[object]) -> None:
    encoder = Encoder(SMALL, corpus.vocabulary.size)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    run = replace(RUN, classify=replace(RUN.classify, freeze_layers=layers, epochs=1))
    tuned(corpus, table(), only_split(table()), run, encoder)
    moved: set[object] = set()
    for name, p in encoder.named_parameters():
        if not torch.equal(p, before[name]):
            moved.add(int(name.split(".")[1]) if name.startswith("layers.") else "embedding")
    assert moved == trained


def test_freezing_more_layers_than_there_are_is_refused(corpus: Corpus) -> None:
    run = replace(RUN, classify=replace(RUN.classify, freeze_layers=3))
    with pytest.raises(
        UserError, match=r"classify.freeze_layers = 3: must be at most the encoder's 2 layers, or 'all'"
    ):
        tuned(corpus, table(), only_split(table()), run)


def test_a_cell_is_classified_alike_whatever_its_batch_mates(corpus: Corpus) -> None:
    model = Classifier(Encoder(SMALL, corpus.vocabulary.size), 3, pooling="mean", cls=False, seed=0)
    sentences = finetune._Sentences(corpus, 0, 32)
    whole = finetune.probabilities(model, sentences, np.arange(20), 64)
    np.testing.assert_array_equal(whole[[7, 3]], finetune.probabilities(model, sentences, np.array([7, 3]), 64))


def test_dropout_depends_on_seed_epoch_and_cell_only(corpus: Corpus) -> None:
    model = Classifier(Encoder(SMALL, corpus.vocabulary.size), 3, pooling="mean", cls=False, seed=0)
    sentences = finetune._Sentences(corpus, 0, 32)

    def logits(cells: list[int], epoch: int) -> torch.Tensor:
        return model(sentences.batch(np.array(cells), (0, epoch, np.array(cells))))

    torch.testing.assert_close(logits([4, 9], 0)[1], logits([9], 0)[0])
    assert not torch.allclose(logits([9], 0), logits([9], 1))
    assert not torch.allclose(logits([9], 0), model(sentences.batch(np.array([9]))))


def test_sentences_are_cut_to_max_len(corpus: Corpus) -> None:
    sentences = finetune._Sentences(corpus, 6, 32)
    cells = np.arange(10)
    batch = sentences.batch(cells)
    assert (
        torch.diff(batch.offsets_B1).tolist()
        == sentences.lengths(cells).tolist()
        == np.minimum(corpus.lengths_N[:10], 6).tolist()
    )


def test_sentences_longer_than_the_encoder_has_positions_are_cut(corpus: Corpus) -> None:
    assert corpus.lengths_N.max() > 8
    encoder = Encoder(replace(SMALL, max_positions=8), corpus.vocabulary.size)
    found = tuned(corpus, table(), only_split(table()), RUN, encoder)
    assert np.isfinite(found.probabilities).all()
    assert [finetune.longest_read(encoder, Classify(max_len=n)) for n in (0, 5, 9)] == [8, 5, 8]


def test_weights_of_genes_read_the_whole_sentence_and_the_encoder_its_positions(corpus: Corpus) -> None:
    encoder = Encoder(replace(SMALL, max_positions=8), corpus.vocabulary.size)
    settings = Classify(gene_weights=True)
    assert [finetune.longest_read(encoder, replace(settings, max_len=n)) for n in (0, 5, 9)] == [0, 5, 9]
    model = finetune.Classifier(encoder, 3, pooling="mean", cls=False, seed=1, gene_weights=True).eval()
    whole = finetune._Sentences(corpus, 0, 8)
    cells = np.flatnonzero(corpus.lengths_N > 8)[:6]
    rng = np.random.default_rng(0)
    genes_CV = rng.normal(size=(3, corpus.vocabulary.size))
    with torch.no_grad():
        model.genes.copy_(torch.from_numpy(genes_CV.T))
        found_BC = model(whole.batch(cells)).numpy()
        vectors_ND = embed.embed_cells(encoder, corpus, cells)
        expected_BC = model.head(torch.from_numpy(vectors_ND)).numpy()
    expected_BC = expected_BC + linear_start.gene_rows(*corpus.tokens(cells), corpus.vocabulary.size) @ genes_CV.T
    assert np.allclose(found_BC, expected_BC, atol=1e-4)
    assert whole.lengths(cells).max() == 8


# Frozen heads


def two_groups(*, across: bool) -> tuple[Labelled, Split]:
    species = np.array(["h", "h", "h", "h", "m", "m"] if across else ["h"] * 6)
    same = np.full(6, "x")
    data = Labelled(cells=np.arange(6), names=np.array(list("abcdef")), labels=np.array(["p", "p", "q", "q", "p", "q"]),
                    species=species, groups=same, donors=same, datasets=same, transfer=same, sources=same)  # fmt: skip
    split = Split(group="x", kind="random", direction="", seed=0, classes=("p", "q"), train=np.arange(4), validation=np.arange(1),
                  test=np.array([4, 5]))  # fmt: skip
    return data, split


TRAIN = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])


@pytest.mark.parametrize("head", HEADS)
def test_heads_tell_two_directions_apart(head: str) -> None:
    data, split = two_groups(across=False)
    made = problem_of(data, split, Config(classify=Classify(knn=2)), TRAIN, np.array([[5.0, 0.0], [-5.0, 0.0]]))
    found = registry.parse(head).fit(made).predict(made.target)
    assert found.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("head", HEADS)
def test_between_species_an_offset_of_all_cells_of_a_species_does_not_matter(head: str) -> None:
    """Unless `classify.align` is off: then both cells are read as the type on their side of the training cells."""
    data, split = two_groups(across=True)
    shifted = np.array([[105.0, 3.0], [95.0, 3.0]])  # the mouse cells lie elsewhere, types apart in the same direction
    for align, expected in ((True, [0, 1]), (False, [0, 0])):
        made = problem_of(data, split, Config(classify=Classify(knn=2, align=align)), TRAIN, shifted)
        found = registry.parse(head).fit(made).predict(made.target)
        assert found.argmax(1).tolist() == expected


def test_labels_come_from_the_corpus_and_unknown_ones_are_left_out(corpus: Corpus) -> None:
    found = labelled(corpus, Classify(unlabelled=("beta",)))
    assert set(found.labels) == {"alpha"}
    assert found.cells.tolist() == list(range(1, CELLS, 2))
    assert set(found.donors) == {""}  # the corpus has no such column


def test_an_untrained_encoder_has_the_shape_of_the_checkpoint_and_other_weights(
    corpus: Corpus, make_corpus, tmp_path
) -> None:
    from mixgf.encoder import checkpoint
    from mixgf.encoder.bert import MaskedModel
    from mixgf.storage import artifacts

    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {})
    uri = str(tmp_path / "pretrain")
    artifacts.begin(uri, record)
    checkpoint.publish_checkpoint(
        uri, record, MaskedModel(SMALL, corpus.vocabulary.size), vocabulary=corpus.vocabulary.hash, tokens=Tokens()
    )
    trained, untrained = (encoders.load(uri, name, RUN, corpus) for name in ("", "untrained"))
    assert trained.sizes == untrained.sizes
    assert not torch.equal(trained.tokens, untrained.tokens)
    assert torch.equal(trained.tokens, Encoder(SMALL, corpus.vocabulary.size).tokens)
    with pytest.raises(UserError, match="made with vocabulary"):
        encoders.load(uri, "", RUN, Corpus(make_corpus([5], [0], [1], genes=50)))


def test_keys_of_the_head_are_not_those_of_a_layer() -> None:
    keys = dropout_keys(0, 0, np.arange(50), 0, np.zeros(50, dtype=np.int64))
    at_head = dropped(keys, finetune._HEAD_SITE, 32, 1 << 15)
    for site in range(40):
        assert abs((at_head == dropped(keys, site, 32, 1 << 15)).float().mean() - 0.5) < 0.1


def test_epochs_are_added_until_a_small_set_has_its_steps(corpus: Corpus) -> None:
    """65 training cells in batches of 8 are 9 steps an epoch: 40 steps need 5 epochs."""
    data = table()
    split = only_split(data)
    steps = -(-len(np.setdiff1d(split.train, split.validation)) // RUN.classify.batch_cells)
    found = tuned(corpus, data, split, replace(RUN, classify=replace(RUN.classify, epochs=1, min_steps=4 * steps + 1)))
    assert len(found.tuned.history) == 5
    assert found.tuned.num_steps == 5 * steps


# Warm start, all layers, weights of genes, adapters

WARM = replace(
    RUN,
    classify=replace(RUN.classify, layer="all", gene_weights=True, warm_start=True, epochs=1, lr=1e-12, warmup_steps=1),
)


def test_a_warm_start_is_epoch_0_and_predicts_when_training_adds_nothing(corpus: Corpus) -> None:
    """At no learning rate worth the name every probability is that of the convex head, through the module and its storage."""
    data, split = table(), only_split(table())
    found = tuned(corpus, data, split, WARM)
    assert [row["epoch"] for row in found.tuned.history] == [0, 1]
    trained = np.setdiff1d(split.train, split.validation)
    encoder, size = Encoder(SMALL, corpus.vocabulary.size), corpus.vocabulary.size
    vectors, tests = (embed.embed_cells(encoder, corpus, rows, layer="all") for rows in (trained, split.test))
    genes, test_genes = (linear_start.gene_rows(*corpus.tokens(rows), size) for rows in (trained, split.test))
    seed = int(hashed(RUN.seed, split.seed, 1)) & 0x7FFFFFFF
    start = linear_start.fit_best(vectors, genes, split.ids(data.labels[trained]), 2, seed=seed)
    np.testing.assert_allclose(found.probabilities, special.softmax(start.logits(tests, test_genes), axis=1), atol=1e-5)
    assert found.tuned.share == start.share
    assert found.tuned.history[0]["train_loss"] == start.loss


def test_a_linear_model_of_genes_tells_types_of_other_genes_apart(corpus: Corpus) -> None:
    """The untrained encoder's head does not after one epoch of no learning; the warm one does before any."""
    split = only_split(table())
    true = split.ids(table().labels[split.test])
    cold = replace(WARM, classify=replace(WARM.classify, warm_start=False))
    assert (tuned(corpus, table(), split, WARM).probabilities.argmax(1) == true).all()
    assert not (tuned(corpus, table(), split, cold).probabilities.argmax(1) == true).all()


def test_weights_of_genes_are_summed_as_the_convex_start_has_them(corpus: Corpus) -> None:
    model = Classifier(
        Encoder(SMALL, corpus.vocabulary.size), 3, pooling="mean", cls=False, seed=0, layer="all", gene_weights=True
    )
    sentences, cells = finetune._Sentences(corpus, 7, 32), np.array([4, 9, 2])
    without = model(sentences.batch(cells))
    with torch.no_grad():
        model.genes.copy_(torch.randn(model.genes.shape, generator=torch.Generator().manual_seed(0)))
    added = (model(sentences.batch(cells)) - without).detach().numpy()
    rows = linear_start.gene_rows(*packed.truncate(*corpus.tokens(cells), 7), corpus.vocabulary.size)
    np.testing.assert_allclose(added, rows @ model.linear()[2].T, atol=1e-5)


def test_adapters_train_themselves_and_the_head_only(corpus: Corpus) -> None:
    """Of the encoder the embedding and the norms stay; every matrix moves by a product of the rank, merged when it is over."""
    encoder, before = (Encoder(SMALL, corpus.vocabulary.size) for _ in range(2))
    run = replace(RUN, classify=replace(RUN.classify, lora_rank=2, epochs=8, lr=0.01))
    found = tuned(corpus, table(), only_split(table()), run, encoder)
    moved = {
        n for (n, p), q in zip(encoder.named_parameters(), before.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert moved == {f"layers.{i}.{name}.weight" for i in range(2) for name in lora.MATRICES}
    change = (encoder.layers[0].up.weight - before.layers[0].up.weight).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    true = only_split(table()).ids(table().labels[only_split(table()).test])
    assert (found.probabilities.argmax(1) == true).mean() >= 0.9


def test_the_scale_of_adapters_reaches_the_training(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, add = [], lora.add_adapters
    monkeypatch.setattr(lora, "add_adapters", lambda *args, seed: (seen.append(args[1:]), add(*args, seed=seed)))
    run = replace(RUN, classify=replace(RUN.classify, lora_rank=2, epochs=1, lr=0.01))
    made = [
        tuned(corpus, table(), only_split(table()), replace(run, classify=replace(run.classify, lora_alpha=alpha)))
        for alpha in (2.0, 32.0)
    ]
    assert seen == [(2, 2.0), (2, 32.0)]
    assert not np.allclose(made[0].probabilities, made[1].probabilities, atol=1e-4)


def test_a_layer_that_the_encoder_does_not_have_is_refused(corpus: Corpus) -> None:
    run = replace(RUN, classify=replace(RUN.classify, layer=-4))
    with pytest.raises(UserError, match=r"classify.layer = -4: must be -3 \(the embedding\) to -1"):
        tuned(corpus, table(), only_split(table()), run)


def test_the_paper_s_way_is_what_finetune_means() -> None:
    settings = Classify()
    assert finetuned.Finetune().recipe(Config()).classify == settings
    assert (settings.lr, settings.warmup_steps, settings.batch_cells, settings.epochs) == (5e-5, 500, 8, 10)
    assert finetuned.FinetuneLinearStart("untrained").recipe(Config()).classify.warm_start
    assert finetuned.Lora().recipe(Config()).classify.lora_rank == finetuned.LORA_RANK
    mine = replace(Config(), classify=replace(settings, lora_rank=3))
    assert finetuned.Lora().recipe(mine).classify.lora_rank == 3


# Between species


def two_species() -> tuple[Labelled, Split]:
    """Cells of the first species train, of the second are tested."""
    data = replace(table(), species=np.array(["human", "mouse"])[np.arange(CELLS) % 2])
    human, mouse = np.arange(0, CELLS, 2), np.arange(1, CELLS, 2)
    split = Split(group="x", kind="species", direction="human>mouse", seed=0, classes=("a", "b"), train=human,
                  validation=human[::9], test=mouse)  # fmt: skip
    return replace(data, labels=np.array(["a", "b"])[np.arange(CELLS) // 2 % 2]), split


def test_another_species_is_read_by_the_ids_of_the_one_that_trains(corpus: Corpus) -> None:
    vocabulary = corpus.vocabulary
    human, mouse = (vocabulary.species_genes(name) for name in ("human", "mouse"))
    pairs = {("human", "mouse"): {human.genes[0]: mouse.genes[2], human.genes[3]: mouse.genes[1]}}
    pairs[("mouse", "human")] = {b: a for a, b in pairs[("human", "mouse")].items()}
    shared = species_alignment.shared_tokens(vocabulary, pairs, "human", "mouse")
    assert shared[mouse.tokens[2]] == shared[human.tokens[0]] == human.tokens[0]
    assert shared[mouse.tokens[1]] == shared[human.tokens[3]] == human.tokens[3]
    assert shared[:NUM_SPECIALS].tolist() == list(range(NUM_SPECIALS))
    assert (shared >= 0).sum() == NUM_SPECIALS + 4


def test_sentences_keep_shared_genes_in_order_and_one_without_any_stays(corpus: Corpus) -> None:
    cells = np.array([3, 8, 5])
    tokens, offsets = corpus.tokens(cells)
    first = tokens[offsets[0] : offsets[1]]
    shared = np.full(corpus.vocabulary.size, -1, dtype=np.int32)
    shared[first[[1, 3]]] = [7, 8]
    expected = [[shared[t] for t in tokens[a:b] if shared[t] >= 0] for a, b in itertools.pairwise(offsets)]
    expected = [e or tokens[a:b].tolist() for e, (a, b) in zip(expected, itertools.pairwise(offsets), strict=True)]
    read, bounds = finetune._Sentences(corpus, 0, 32, shared).tokens(cells)
    assert [read[a:b].tolist() for a, b in itertools.pairwise(bounds)] == expected
    assert expected[0] == [7, 8]


def test_a_shift_of_all_scores_of_a_species_is_undone_whatever_the_sizes_of_the_classes() -> None:
    """Tested cells lie elsewhere and have other shares of the classes: the means of the classes' means meet, exactly."""
    rng = np.random.default_rng(0)
    labels, true = np.repeat([0, 1, 2], [40, 10, 5]), np.repeat([0, 1, 2], [4, 20, 30])
    train, test = (np.eye(3)[ids] * 8 + rng.normal(size=(len(ids), 3)) for ids in (labels, true))
    away = test + np.array([5.0, 0.0, -3.0])
    assert (away.argmax(1) != true).mean() > 0.2
    found = species_alignment.align_scores(special.softmax(away, axis=1), special.softmax(train, axis=1), labels)
    assert (found.argmax(1) == true).all()
    scores, expected = np.log(found), np.log(special.softmax(train, axis=1))
    means = [
        np.stack([x[ids == c].mean(0) for c in range(3)]).mean(0) for x, ids in ((scores, true), (expected, labels))
    ]
    np.testing.assert_allclose(means[0] - means[0].mean(), means[1] - means[1].mean(), atol=1e-9)


def test_only_an_aligned_model_reads_orthologs(corpus: Corpus) -> None:
    data, split = two_species()
    encoder = Encoder(SMALL, corpus.vocabulary.size)
    for align in (False, True):
        run = replace(RUN, classify=replace(RUN.classify, align=align))
        assert (finetune._sentences(encoder, problem(corpus, data, split, run), run).shared_V is not None) == align
    within = replace(split, test=split.validation)
    assert finetune._sentences(encoder, problem(corpus, data, within, run), run).shared_V is None


def test_another_species_is_predicted_by_the_convex_start(corpus: Corpus) -> None:
    """Types that differ in genes with orthologs are carried over, though no token of the tested cells was ever trained on."""
    data, split = two_species()
    human, mouse = (corpus.vocabulary.species_genes(name).tokens[0] for name in ("human", "mouse"))
    has = np.array([bool({human, mouse} & set(corpus.tokens([i])[0].tolist())) for i in range(CELLS)])
    data = replace(data, labels=np.where(has, "a", "b"))
    run = replace(WARM, vocab=Vocab(orthologs=(f"{corpus.uri}/orthologs.parquet",)))
    run = replace(run, classify=replace(run.classify, align=True))
    found = tuned(corpus, data, split, run)
    assert [row["epoch"] for row in found.tuned.history] == [0]
    assert found.tuned.share == linear_start.SHARES[-1]
    true = split.ids(data.labels[split.test])
    assert (found.probabilities.argmax(1) == true).mean() > max(true.mean(), 1 - true.mean()) + 0.15
    unaligned = tuned(corpus, data, split, replace(run, classify=replace(run.classify, align=False)))
    assert (unaligned.probabilities.argmax(1) == true).mean() < (found.probabilities.argmax(1) == true).mean()
