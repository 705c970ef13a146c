"""A new organism: a species that the code has never heard of joins a trained model, from a gene table and an ortholog table.

The rat here is invented: bundled mouse cells with their genes renamed, of which some have no ortholog.
"""

import dataclasses

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from executors import dying
from scipy import sparse

from mixgf import cli
from mixgf.config import data, parse, run, training
from mixgf.config.data import QC, Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.run import Inputs, Tracking
from mixgf.config.training import Train
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.embed import embed_cells
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes.species import gene_table
from mixgf.report.results import RunResults
from mixgf.report.sections import pretraining
from mixgf.stages import embed, import_weights, prepare, pretrain
from mixgf.storage import artifacts, files, tables
from mixgf.training import loop, worker_group
from mixgf.training.pretraining import Pretraining

PER_SPECIES = 80
ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=64)


def rat_of(mouse):
    return mouse.replace("ENSMUSG", "ENSRNOG")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tracking_uri):
    """A config over a few bundled cells of human and mouse, their corpus, and an encoder with random weights."""
    folder = tmp_path_factory.mktemp("organism")
    sources = []
    for name in ("human", "mouse"):
        with files.local_copy(f"resource:pancreas_{name}_baron.h5ad") as path:
            cells = anndata.read_h5ad(path)
        known = np.flatnonzero(cells.var["ensembl_id"].to_numpy() != "")
        counts = sparse.csr_matrix(cells.X[:PER_SPECIES].toarray()[:, known[::5]])
        cells = anndata.AnnData(counts, obs=cells.obs[:PER_SPECIES], var=cells.var.iloc[known[::5]])
        cells.write_h5ad(folder / f"{name}.h5ad")
        sources.append(Source(uri=str(folder / f"{name}.h5ad"), species=name))
    return run.Config(
        output=str(folder / "old"), sources=tuple(sources), model=ROW, tokens=Tokens(max_len=64), qc=QC(method="none"),
        prepare=Prepare(shard_cells=50, block_cells=50), train=Train(epochs=1, batch_cells=25, warmup_steps=2, lr=1e-3),
        tracking=Tracking(uri=tracking_uri), compute=run.Compute(num_workers=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def old(base, ray_local):
    """The finished run of two species: corpus, checkpoint."""
    prepare.run(base, executor=LocalExecutor())
    pretrain.run(base)
    return base


@pytest.fixture(scope="module")
def rat(old, tmp_path_factory):
    """The config that adds rats: a gene table, an ortholog table, their cells; nothing else."""
    folder = tmp_path_factory.mktemp("rat")
    cells = anndata.read_h5ad(old.sources[1].uri)
    mouse = gene_table(data.MOUSE)
    table = pa.table({
        "gene": [rat_of(g) for g in mouse["gene"].to_pylist()], "symbol": mouse["symbol"], "biotype": mouse["biotype"],
        "is_mito": mouse["is_mito"],
    })  # fmt: skip
    pq.write_table(table, folder / "genes.parquet")
    names = sorted(table["gene"].to_pylist())
    lonely = set(names[::10])
    both = [g for g in mouse["gene"].to_pylist() if rat_of(g) not in lonely]
    pq.write_table(pa.table({"rat": [rat_of(g) for g in both], "mouse": both}), folder / "orthologs.parquet")
    cells.var = cells.var[[]].set_axis([rat_of(g) for g in cells.var["ensembl_id"]])
    cells.write_h5ad(folder / "rat.h5ad")
    row = SpeciesRow(name="rat", taxon=10116, gene_prefix="ENSRNOG", genes=str(folder / "genes.parquet"))
    return dataclasses.replace(
        old, output=str(folder / "rat"), species=(*old.species, row), sources=(Source(uri=str(folder / "rat.h5ad"), species="rat"),),
        vocab=Vocab(reuse=f"{old.output}/vocabulary", orthologs=(*old.vocab.orthologs, str(folder / "orthologs.parquet"))),
        prepare=dataclasses.replace(old.prepare, extend=f"{old.output}/corpus"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def grown(rat):
    """Corpus of three species, and the old checkpoint grown to it: two commands."""
    prepare.run(rat, executor=LocalExecutor())
    start = dataclasses.replace(rat, output=f"{rat.output}-start", inputs=Inputs(corpus=f"{rat.output}/corpus"))
    import_weights.bring(start, f"{_old(rat)}/pretrain")
    return dataclasses.replace(rat, inputs=Inputs(start=f"{start.output}/pretrain"))


def _old(rat):
    return rat.prepare.extend.removesuffix("/corpus")


def sentences(corpus, name):
    cells = np.flatnonzero(corpus.species_N == corpus.species.index(name))
    tokens, offsets = corpus.tokens(cells)
    return cells, np.split(tokens, offsets[1:-1])


def test_old_ids_sentences_and_embeddings_stay_to_the_bit(grown):
    before, after = Corpus(f"{_old(grown)}/corpus"), Corpus(f"{grown.output}/corpus")
    table = before.vocabulary.table
    assert after.vocabulary.table.slice(0, table.num_rows).equals(table)
    assert after.species == ("human", "mouse", "rat")
    assert after.vocabulary.ancestor(before.vocabulary.hash).table.equals(table)
    assert after.vocabulary.ancestor("no such hash") is None
    for name in ("human", "mouse"):
        mine, theirs = (sentences(c, name)[1] for c in (before, after))
        assert all(map(np.array_equal, mine, theirs))
        assert len(mine) == len(theirs) > 70
    (a, _), (b, record) = (checkpoint.load_encoder(uri) for uri in (f"{_old(grown)}/pretrain", grown.inputs.start))
    assert np.array_equal(
        embed_cells(a, before, range(before.num_cells)), embed_cells(b, after, range(before.num_cells))
    )
    assert record.parents == {
        "corpus": after.record.fingerprint, "grown from": artifacts.require(f"{_old(grown)}/pretrain", "checkpoint").fingerprint,
    }  # fmt: skip


def test_a_new_gene_starts_as_its_ortholog_or_at_random_and_is_untrained(grown):
    corpus = Corpus(f"{grown.output}/corpus")
    model, record = checkpoint.load_model(grown.inputs.start)
    rats, mice = (
        dict(zip((g := corpus.vocabulary.species_genes(n)).genes, g.tokens, strict=True)) for n in ("rat", "mouse")
    )
    partner = {rat_of(m): m for m in mice}
    names = sorted(gene_table(grown.species[2])["gene"].to_pylist())
    lonely = set(names[::10])
    heirs = [g for g in rats if g not in lonely]
    assert len(heirs) > 5 * len(lonely & set(rats)) > 500
    weight, bias = model.encoder.tokens, model.bias
    assert torch.equal(weight[[rats[g] for g in heirs]], weight[[mice[partner[g]] for g in heirs]])
    assert torch.equal(bias[[rats[g] for g in heirs]], bias[[mice[partner[g]] for g in heirs]])
    others = weight[[rats[g] for g in sorted(lonely & set(rats))]].detach()
    assert others.std().item() == pytest.approx(ROW.init_sd, rel=0.05)
    assert checkpoint.untrained_ids(record).tolist() == sorted(rats.values())
    assert record.counts == {"steps": 0, "genes_rat": len(rats), "from_orthologs_rat": len(heirs)}
    page = pretraining.section(RunResults(config=grown, uris={}, records={"pretrain": record}))
    assert f"{len(rats):,} of {corpus.vocabulary.size:,} token ids are untrained" in page.blocks[1].text


def test_before_any_training_a_rat_lies_by_the_mouse_it_was_made_of(grown):
    corpus = Corpus(f"{grown.output}/corpus")
    encoder, _ = checkpoint.load_encoder(grown.inputs.start)
    (rats, of_rats), (mice, of_mice) = (sentences(corpus, name) for name in ("rat", "mouse"))
    genes = corpus.vocabulary.genes()
    assert [genes[t] for t in of_rats[7]] == [rat_of(genes[t]) for t in of_mice[7]]  # one animal, two names
    a, b = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (embed_cells(encoder, corpus, c) for c in (rats, mice))
    )
    nearest = (a @ b.T).argmax(axis=1)
    assert (nearest == np.arange(len(rats))).mean() > 0.9  # 1 / 80 by chance


def test_training_goes_on_from_there_and_makes_ids_trained_and_embeds(grown, ray_local):
    uri = pretrain.run(grown)
    record, start = (artifacts.require(u, "checkpoint") for u in (uri, grown.inputs.start))
    assert record.parents["start"] == start.fingerprint
    corpus = Corpus(f"{grown.output}/corpus")
    seen = np.unique(corpus.tokens(range(corpus.num_cells))[0])
    left = np.setdiff1d(checkpoint.untrained_ids(start), seen)
    assert checkpoint.untrained_ids(record).tolist() == left.tolist()
    assert 0 < len(left) < len(checkpoint.untrained_ids(start))
    history = tables.read_table(f"{uri}/history.parquet").to_pandas()
    first = history[(history["name"] == "mlm") & (history["step"] == 1)]["value"].item()
    fresh = dataclasses.replace(grown, output=f"{grown.output}-fresh", inputs=Inputs(corpus=corpus.uri))
    history = tables.read_table(f"{pretrain.run(fresh)}/history.parquet").to_pandas()
    model, _ = checkpoint.load_model(grown.inputs.start)
    once = dataclasses.replace(grown, train=dataclasses.replace(grown.train, max_steps=1))
    rows = loop.fit(model, Pretraining(once, corpus), once.train, worker_group.LocalContext())
    at_start = next(value for step, _, name, value in rows if (step, name) == (1, "mlm"))
    assert first == pytest.approx(at_start, rel=1e-5)  # the loss of the weights that it starts from
    assert first < history[(history["name"] == "mlm") & (history["step"] == 1)]["value"].item()
    few = dataclasses.replace(grown, output=f"{grown.output}-few", train=dataclasses.replace(grown.train, max_steps=1))
    few = dataclasses.replace(few, inputs=Inputs(corpus=corpus.uri, start=grown.inputs.start))
    assert set(left) < set(checkpoint.untrained_ids(artifacts.require(pretrain.run(few), "checkpoint")))
    vectors = embed.load(embed.run(grown))
    assert vectors.shape == (corpus.num_cells, ROW.dim)
    before = files.read_bytes(f"{uri}/record.json")
    assert pretrain.run(grown) == uri
    assert files.read_bytes(f"{uri}/record.json") == before


def test_the_same_by_the_command_line_killed_on_the_way_and_twice(rat, grown, tmp_path):
    again = dataclasses.replace(rat, output=str(tmp_path / "rat"))
    calls = []

    with pytest.raises(KeyboardInterrupt):
        prepare.run(again, executor=dying(5, calls))
    prepare.run(again, executor=LocalExecutor())
    assert Corpus(f"{again.output}/corpus").vocabulary.hash == Corpus(f"{grown.output}/corpus").vocabulary.hash
    files.write_json(str(tmp_path / "rat.json"), parse.to_dict(again))
    command = ["import-weights", f"{_old(rat)}/pretrain", "--config", str(tmp_path / "rat.json")]
    assert cli.main(command) == 0
    first, theirs = (
        files.read_bytes(f"{uri}/{checkpoint.WEIGHTS}") for uri in (f"{again.output}/pretrain", grown.inputs.start)
    )
    assert first == theirs
    record = files.read_bytes(f"{again.output}/pretrain/record.json")
    assert cli.main(command) == 0
    assert files.read_bytes(f"{again.output}/pretrain/record.json") == record


def test_shared_ids_stay_shared(rat, tmp_path):
    """With one id per ortholog, a rat gene takes the id of its mouse's, and only lonely genes are new."""
    shared = dataclasses.replace(
        rat, output=str(tmp_path / "old"), sources=rat.prepare and _sources(rat), species=rat.species[:2],
        vocab=Vocab(sharing="ortholog"), prepare=Prepare(shard_cells=50, block_cells=50),
    )  # fmt: skip
    prepare.run(shared, executor=LocalExecutor())
    new = dataclasses.replace(
        rat, output=str(tmp_path / "new"), prepare=Prepare(shard_cells=50, block_cells=50),
        vocab=dataclasses.replace(rat.vocab, reuse=f"{shared.output}/vocabulary"),
    )  # fmt: skip
    found = Corpus(prepare.run(new, executor=LocalExecutor())).vocabulary
    rats, mice = (dict(zip((g := found.species_genes(n)).genes, g.tokens, strict=True)) for n in ("rat", "mouse"))
    size = Corpus(f"{shared.output}/corpus").vocabulary.size
    fresh = {t for t in rats.values() if t >= size}
    assert found.sharing == "ortholog"
    assert all(rats[rat_of(m)] in fresh | {t} for m, t in mice.items() if rat_of(m) in rats)
    assert 0 < len(fresh) < len(rats) / 5


def _sources(rat):
    return tuple(Source(uri=f"{_old(rat).removesuffix('/old')}/{n}.h5ad", species=n) for n in ("human", "mouse"))


def test_what_cannot_be_grown_or_started_from_says_so(old, grown, tmp_path):
    alone = dataclasses.replace(
        old, output=str(tmp_path / "alone"), sources=old.sources[:1], qc=QC(method="none", max_cells_per_sample=30)
    )
    prepare.run(alone, executor=LocalExecutor())
    with pytest.raises(UserError, match=r"its vocabulary is no beginning of that of .*vocab.reuse"):
        import_weights.bring(alone, f"{old.output}/pretrain")
    with pytest.raises(UserError, match=r"inputs.start: made with vocabulary"):
        pretrain.run(dataclasses.replace(alone, inputs=Inputs(start=grown.inputs.start)))
    with_cls = dataclasses.replace(
        alone, output=str(tmp_path / "cls"), tokens=Tokens(max_len=64, cls=True), vocab=Vocab(reuse=f"{old.output}/vocabulary"),
    )  # fmt: skip
    prepare.run(with_cls, executor=LocalExecutor())
    with pytest.raises(UserError, match=r"tokens.cls = false, .* has true; prepare that with --set tokens.cls=false"):
        import_weights.bring(with_cls, f"{old.output}/pretrain")
    assert not files.exists(f"{with_cls.output}/pretrain/plan.json")
    wide = dataclasses.replace(grown, output=str(tmp_path / "wide"), model=dataclasses.replace(ROW, dim=64))
    wide = dataclasses.replace(wide, inputs=Inputs(start=grown.inputs.start, corpus=f"{grown.output}/corpus"))
    with pytest.raises(UserError, match=r"inputs.start = .*a model of other sizes: model.dim: 32 -> 64"):
        pretrain.run(wide)
