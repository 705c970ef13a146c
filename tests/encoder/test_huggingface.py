"""Laws of weights in and out: a published model gives the same states and scores here, by its own genes, and ours there.

No published weights are on this machine: models of their exact shapes are made by transformers with random weights.
"""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from mixgf import cli
from mixgf.config import parse
from mixgf.config.data import HUMAN, MOUSE
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.genes.species import gene_table
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import export, import_weights
from mixgf.storage import artifacts, files
from mixgf.storage.tables import write_table

transformers = pytest.importorskip("transformers")
ROWS = {"human": HUMAN, "mouse": MOUSE}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def corpus(folder, *, species=("human",), genes=300, cls=False, longest=60):
    """A corpus of four cells per species over the last `genes` genes of the real gene tables, in ids of its own."""
    names = {name: sorted(gene_table(ROWS[name])["gene"].to_pylist())[-genes:] for name in species}
    flat = [(name, gene) for name in species for gene in names[name]]
    table = pa.table({
        "token": pa.array(np.arange(len(flat)) + 3, pa.int32()), "gene": [g for _, g in flat], "symbol": [g for _, g in flat],
        "species": [s for s, _ in flat], "median": np.ones(len(flat)), "biotype": ["protein_coding"] * len(flat),
    })  # fmt: skip
    vocabulary = Vocabulary(table, species=tuple(species), sharing="separate")
    vocabulary.save(f"{folder}/corpus/vocabulary.parquet")
    rng = np.random.default_rng(0)
    starts = 3 + np.repeat(np.arange(len(species)), 4) * genes
    cells = [
        [2] * cls + (rng.permutation(genes)[: longest - 7 * i] + s).tolist() for i, s in enumerate(starts.tolist())
    ]
    lengths, codes = (
        np.array([len(c) for c in cells], dtype=np.int32),
        np.repeat(np.arange(len(species)), 4).astype(np.int8),
    )
    write_table(f"{folder}/corpus/shards/0.parquet", pa.table({"tokens": pa.array(cells, pa.list_(pa.int32()))}))
    write_table(f"{folder}/corpus/index.parquet", pa.table({"length": lengths, "species": codes}))
    record = artifacts.plan("corpus", 1, {"tokens": {"cls": cls, "max_len": int(lengths.max())}}, {})
    details = {
        "species": list(species),
        "vocabulary": vocabulary.hash,
        "shards": [{"name": "0.parquet", "rows": len(cells)}],
    }
    artifacts.finish(f"{folder}/corpus", record, details=details)
    return Corpus(f"{folder}/corpus")


def published(folder, *, specials, species, vocab_size, tables=None, binary=False, **sizes):
    """A model with random weights of some shape, its dictionary (genes in falling order: no id is ours), and the model."""
    transformers.set_seed(0)
    shape = {"max_position_embeddings": 2048, "hidden_act": "relu", "initializer_range": 0.1} | sizes
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=vocab_size, **shape)).eval()
    with torch.no_grad():
        bert.cls.predictions.bias.normal_()
        bert.bert.embeddings.token_type_embeddings.weight.normal_()
    bert.save_pretrained(folder)
    if binary:
        state = {k: v for k, v in bert.state_dict().items() if "decoder" not in k}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    genes = sorted((g for name in species for g in gene_table(ROWS[name])["gene"].to_pylist()), reverse=True)
    names = [*specials, *genes][:vocab_size]
    dictionary = {name: i for i, name in enumerate(names)}
    (folder / "token_dictionary.json").write_text(json.dumps(dictionary))
    return bert, dictionary


def states(bert, dictionary, cells, genes):
    """The published model's last hidden states, and its scores at the vocabulary's genes it knows."""
    out = []
    for cell in cells:
        ids = torch.tensor([[dictionary["<cls>"] if t == 2 else dictionary[genes[t]] for t in cell]])
        found = bert(input_ids=ids, output_hidden_states=True)
        out.append((found.hidden_states[-1][0], found.logits[0]))
    return out


SHAPES = {
    "Geneformer V1": {
        "specials": ["<pad>", "<mask>"], "species": ["human"], "vocab_size": 25_426, "hidden_dropout_prob": 0.02,
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512, "binary": True,
    },
    "Mouse-Geneformer": {
        "specials": ["<pad>", "<mask>"], "species": ["mouse"], "vocab_size": 56_084, "hidden_act": "silu",
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512,
    },
    "Geneformer V2, narrow": {
        "specials": ["<pad>", "<mask>", "<cls>", "<eos>"], "species": ["human"], "vocab_size": 20_275,
        "max_position_embeddings": 4096, **SMALL,
    },
    "Geneformer V2": {
        "specials": ["<pad>", "<mask>", "<cls>", "<eos>"], "species": ["human"], "vocab_size": 20_275,
        "max_position_embeddings": 4096, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "Geneformer V2" else ()) for n in SHAPES], ids=list(SHAPES)
)
def test_a_published_model_gives_its_states_and_scores_here_and_comes_back(tmp_path, name, tracking_uri):
    shape = SHAPES[name]
    folder = tmp_path / "published"
    bert, dictionary = published(folder, **shape)
    cells = corpus(tmp_path, species=shape["species"], cls="<cls>" in shape["specials"])
    run = ["--output", str(tmp_path), "--set", f"tracking.uri={tracking_uri}"]
    assert cli.main(["import-weights", str(folder), *run]) == 0
    model, record = checkpoint.load_model(f"{tmp_path}/pretrain")
    assert record.counts == {"steps": 0, f"genes_{shape['species'][0]}": 300}
    genes = cells.vocabulary.genes()
    tokens, offsets = cells.tokens(range(4))
    sentences = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    columns = torch.tensor([dictionary[g] for g in genes[3:]])
    hidden = model.encoder(torch.from_numpy(tokens).long(), torch.from_numpy(offsets).int())
    for (theirs, scores), a, b in zip(
        states(bert, dictionary, sentences, genes), offsets[:-1], offsets[1:], strict=True
    ):
        assert torch.allclose(hidden[a:b], theirs, atol=1e-5, rtol=0)
        assert torch.allclose(model.logits(hidden[a:b])[:, 3:], scores[:, columns], atol=1e-4, rtol=1e-5)

    assert cli.main(["export", *run]) == 0
    back = transformers.BertForMaskedLM.from_pretrained(f"{tmp_path}/bert").eval()
    ours = files.read_json(f"{tmp_path}/bert/token_dictionary.json")
    assert [ours[g] for g in genes] == list(range(len(genes)))
    for a, b in itertools.pairwise(offsets):
        again = back(input_ids=torch.from_numpy(tokens[a:b]).long()[None], output_hidden_states=True)
        assert torch.allclose(hidden[a:b], again.hidden_states[-1][0], atol=1e-5, rtol=0)
        assert torch.allclose(model.logits(hidden[a:b]), again.logits[0], atol=1e-4, rtol=1e-5)
    sizes = back.config
    for field in ("hidden_act", "max_position_embeddings", "hidden_size", "num_attention_heads", "hidden_dropout_prob"):
        assert getattr(sizes, field) == getattr(bert.config, field), field


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    published(folder, specials=["<pad>", "<mask>"], species=["human"], vocab_size=30_000, **SMALL)
    return folder


def settings(output, tracking_uri, *changes):
    return parse.override(Config(), [f"output={output}", f"tracking.uri={tracking_uri}", *changes])


def test_genes_that_a_model_does_not_know_are_counted_and_start_anew(small, tmp_path, tracking_uri, caplog):
    cells = corpus(tmp_path, species=("human", "mouse"), genes=50)
    with caplog.at_level("INFO", "mixgf"):
        uri = import_weights.bring(settings(tmp_path, tracking_uri), str(small))
    assert "human: 50 of 50 genes have the model's vectors" in caplog.text
    assert "mouse: 0 of 50 genes" in caplog.text
    assert (
        "the Geneformer family calls the second last so: take second_last, -2 (embed.layer, perturb.layer)\n"
        in caplog.text
    )
    assert "a cell is the mean over its genes; poolers and projection heads are not imported" in caplog.text
    tokens = checkpoint.load_model(uri)[0].encoder.tokens.detach()
    theirs = transformers.BertForMaskedLM.from_pretrained(small).get_input_embeddings().weight
    dictionary, genes = json.loads((small / "token_dictionary.json").read_text()), cells.vocabulary.genes()
    for token in cells.vocabulary.species_genes("human").tokens.tolist():
        assert torch.equal(tokens[token], theirs[dictionary[genes[token]]])
    mouse = tokens[cells.vocabulary.species_genes("mouse").tokens.tolist()]
    assert torch.equal(mouse, MaskedModel(checkpoint.load_model(uri)[0].encoder.sizes, len(genes)).encoder.tokens[-50:])
    before = files.sha256(f"{uri}/model.safetensors")
    assert import_weights.bring(settings(tmp_path, tracking_uri), str(small)) == uri
    assert files.sha256(f"{uri}/model.safetensors") == before
    with pytest.raises(UserError, match=r"holds another checkpoint: config.seed: 0 -> 1"):
        import_weights.bring(settings(tmp_path, tracking_uri, "seed=1"), str(small))


def edit(**changes):
    def change(folder):
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (data | changes).items() if v is not None}))

    return change


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])


def hostile(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": print}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"no folder with a config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"no weights in it; there must be model\.safetensors or pytorch"),
        (cut, r"model\.safetensors: not readable as tensors .*fetch it again"),
        (hostile, r"pytorch_model\.bin: not readable as tensors .*fetch it again"),
        (edit(model_type="gpt2"), r"model_type 'gpt2' with absolute positions; only 'bert'"),
        (edit(position_embedding_type="relative_key"), r"with relative_key positions; only 'bert'"),
        (edit(hidden_act="gelu_new"), r"config\.json: model\.activation = 'gelu_new': must be"),
        (edit(hidden_size=None), r"config\.json: no hidden_size"),
        (edit(num_hidden_layers=3), r"weights without 'encoder\.layer\.2\..*need a BERT with at least 3 layers"),
        (edit(hidden_size=64), r"vectors of width 32, config\.json says 64"),
        (lambda f: (f / "token_dictionary.json").unlink(), r"imports\.dictionaries: none given and no token_dictionary"),
        (lambda f: (f / "token_dictionary.json").write_text('{"A": 0, "B": 40000}'), r"ids up to 40,000, but the model has 30,000"),
        (lambda f: (f / "token_dictionary.json").write_text('{"A": 0, "B": 1}'), r"none of its genes is in the corpus"),
    ],
    ids=["no-config", "no-weights", "cut", "code", "gpt2", "relative", "act", "lacking", "layers", "width", "no-ids",
         "other-ids", "other-genes"],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused_in_one_line_and_leaves_no_checkpoint(
    small, tmp_path, tracking_uri, change, message
):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    corpus(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        import_weights.bring(settings(tmp_path, tracking_uri), str(folder))
    assert "\n" not in str(caught.value)
    assert artifacts.find(f"{tmp_path}/pretrain") is None


def test_a_corpus_with_cls_is_refused_for_a_model_without(small, tmp_path, tracking_uri):
    corpus(tmp_path, cls=True)
    with pytest.raises(UserError, match=r"tokens\.cls = true: this model knows no <cls>; prepare the corpus with"):
        import_weights.bring(settings(tmp_path, tracking_uri), str(small))


def test_an_export_needs_the_corpus_whose_vocabulary_the_weights_have(small, tmp_path, tracking_uri):
    corpus(tmp_path / "a")
    corpus(tmp_path / "b", genes=301)
    uri = import_weights.bring(settings(tmp_path / "a", tracking_uri), str(small))
    with pytest.raises(UserError, match=r"inputs\.checkpoint: made with vocabulary"):
        export.export(settings(tmp_path / "b", tracking_uri, f"inputs.checkpoint={uri}"))
