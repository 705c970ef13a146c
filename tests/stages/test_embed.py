import dataclasses

import anndata as ad
import numpy as np
import pytest
import torch

from mixgf.config import data, run, training
from mixgf.corpus import reader
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.embed import embed_cells, embed_sentences, embed_shard, plan_shards, read_sentences, write_vectors
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import embed
from mixgf.storage import artifacts, files, tables

pytestmark = pytest.mark.ray
ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40)


@pytest.fixture(scope="module")
def settings(make_corpus, tmp_path_factory):
    uri = make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 10, 4])
    output = str(tmp_path_factory.mktemp("run"))
    vocabulary = reader.Corpus(uri).vocabulary
    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {})
    artifacts.begin(f"{output}/pretrain", record)
    model = MaskedModel(ROW, vocabulary.size)
    checkpoint.publish_checkpoint(
        f"{output}/pretrain", record, model, vocabulary=vocabulary.hash, tokens=data.Tokens(max_len=40)
    )
    return run.Config(output=output, inputs=run.Inputs(corpus=uri), compute=run.Compute(num_workers=2))


def test_the_cluster_gives_what_the_pure_function_gives_and_a_second_run_does_nothing(ray_local, settings):
    uri = embed.run(settings)
    corpus = reader.Corpus(settings.inputs.corpus)
    encoder, _ = checkpoint.load_encoder(f"{settings.output}/pretrain")
    expected = embed_cells(encoder, corpus, range(23))
    assert np.array_equal(embed.load(uri), expected)
    cells = ad.read_h5ad(f"{uri}/cells.h5ad")
    assert np.array_equal(cells.obsm["X_mixgf"], expected)
    assert cells.obs_names.tolist() == [f"source:{i}" for i in range(23)]
    assert cells.obs["species"].tolist() == ["human", "mouse"] * 11 + ["human"]
    before = files.read_bytes(f"{uri}/record.json")
    assert embed.run(settings) == uri
    assert files.read_bytes(f"{uri}/record.json") == before


def test_shards_are_work_units_on_the_boards(ray_local, settings, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(embed.Meter, "units", lambda self, **states: told.append((self.stage, states)))
    first = dataclasses.replace(
        settings, output=str(tmp_path), inputs=dataclasses.replace(settings.inputs, checkpoint=f"{settings.output}/pretrain")
    )  # fmt: skip
    embed.run(first)
    assert told == [("embed", {"waiting": 3})] + [("embed", {"waiting": 3 - i, "done": i}) for i in (1, 2, 3)]


def test_a_killed_run_computes_only_the_missing_shards(ray_local, settings, tmp_path):
    first = dataclasses.replace(
        settings, inputs=dataclasses.replace(settings.inputs, checkpoint=f"{settings.output}/pretrain")
    )
    whole, part = (dataclasses.replace(first, output=f"{tmp_path}/{name}") for name in ("whole", "part"))
    expected = embed.load(embed.run(whole))
    files.write_json(f"{part.output}/embed/plan.json", _plan(whole))
    name = "shards/00001.parquet"
    files.write_bytes(f"{part.output}/embed/{name}", files.read_bytes(f"{whole.output}/embed/{name}"))
    stamp = files.local_path(f"{part.output}/embed/{name}").stat().st_mtime_ns
    assert np.array_equal(embed.load(embed.run(part)), expected)
    assert files.local_path(f"{part.output}/embed/{name}").stat().st_mtime_ns == stamp


def _plan(settings):
    return dataclasses.asdict(artifacts.find(f"{settings.output}/embed"))


def test_a_layer_the_model_does_not_have_and_foreign_sentences_are_refused(settings, make_corpus):
    with pytest.raises(UserError, match=r"embed.layer = -4: must be -3 \(the embedding\) to -1"):
        embed.run(dataclasses.replace(settings, embed=training.Embed(layer=-4)))
    foreign = make_corpus([5], [0], [1], genes=50)
    with pytest.raises(UserError, match=r"inputs.checkpoint: made with vocabulary"):
        embed.run(dataclasses.replace(settings, inputs=run.Inputs(corpus=foreign)))
    with_cls = make_corpus([5], [0], [1], cls=True)
    with pytest.raises(
        UserError,
        match=r"inputs.checkpoint: trained on sentences with tokens.cls = false, .* has true; prepare that with --set tokens.cls=false",
    ):
        embed.run(dataclasses.replace(settings, inputs=run.Inputs(corpus=with_cls)))


def test_a_damaged_shard_is_named_and_the_others_are_kept(settings, make_corpus, tmp_path):
    uri = make_corpus(np.arange(5, 12), np.zeros(7, int), [3, 4])
    first, second = (f"{uri}/shards/0000{i}.parquet" for i in range(2))
    whole = files.read_bytes(first)
    tables.write_table(first, tables.read_table(first).take([1, 0, 2]))
    inputs = run.Inputs(corpus=uri, checkpoint=f"{settings.output}/pretrain")
    chosen = dataclasses.replace(settings, output=str(tmp_path), inputs=inputs)
    with pytest.raises(
        UserError, match=r"embed: 1 shards cannot be used, .*00000.parquet: damaged \(it has other bytes"
    ):
        embed.run(chosen, executor=LocalExecutor())
    assert files.list_dir(f"{tmp_path}/embed/shards") == ["00001.parquet"]
    files.write_bytes(first, whole)
    assert len(embed.load(embed.run(chosen, executor=LocalExecutor()))) == 7
    assert files.exists(second)


def test_a_temporary_file_of_a_killed_worker_does_not_stay(settings, tmp_path):
    left = tmp_path / "embed" / "shards" / ".writing-0"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    inputs = run.Inputs(corpus=settings.inputs.corpus, checkpoint=f"{settings.output}/pretrain")
    uri = embed.run(dataclasses.replace(settings, output=str(tmp_path), inputs=inputs), executor=LocalExecutor())
    assert len(embed.load(uri)) == reader.Corpus(inputs.corpus).num_cells
    assert not left.exists()


def test_no_cut_of_the_rows_changes_a_byte(settings, tmp_path):
    corpus = reader.Corpus(settings.inputs.corpus)
    record = artifacts.require(f"{settings.output}/pretrain", checkpoint.KIND)
    parts = [f"{tmp_path}/{i}" for i in range(3)]
    plan = plan_shards(settings, corpus, f"{settings.output}/pretrain", record.fingerprint, parts)[0]
    (whole,) = read_sentences(plan)
    for step in (1, 4, 10):
        write_vectors(embed_sentences((whole.slice(i, step) for i in range(0, 9, step)), plan), plan)
        found = files.read_bytes(plan.to)
        embed_shard(plan)
        assert files.read_bytes(plan.to) == found


def test_a_worker_computes_on_the_gpu_that_is_asked_for_or_stops(settings, monkeypatch, tmp_path):
    asked = []
    encoder, _ = checkpoint.load_encoder(f"{settings.output}/pretrain")
    monkeypatch.setattr(checkpoint, "load_encoder", lambda _, device: (asked.append(device), (encoder, None))[1])
    corpus, weights = reader.Corpus(settings.inputs.corpus), f"{settings.output}/pretrain"

    def work(gpus, version):
        chosen = dataclasses.replace(settings, compute=run.Compute(gpus_per_worker=gpus))
        for plan in plan_shards(chosen, corpus, weights, version, [f"{tmp_path}/{i}" for i in range(3)]):
            embed_shard(plan)

    for available, gpus in ((True, 1.0), (True, 0.0), (False, 0.0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        work(gpus, f"{available} {gpus}")
    assert asked == [torch.device(name) for name in ("cuda", "cpu", "cpu")], "loaded once for three shards"
    with pytest.raises(UserError, match=r"^compute.gpus_per_worker = 1: no GPU here"):
        work(1.0, "none")
