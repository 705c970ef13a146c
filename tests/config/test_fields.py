"""Laws of field metadata: what counts for a fingerprint, what is a path, what is allowed."""

from dataclasses import replace

import pytest

from mixgf.config.classification import Classify
from mixgf.config.comparison import Compare
from mixgf.config.data import Source, Vocab
from mixgf.config.fields import content_of, facts_of, names, sections_of, with_absolute_paths
from mixgf.config.parse import sections, to_dict
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config, Inputs
from mixgf.config.training import Objective, Train
from mixgf.errors import UserError


def test_settings_of_speed_cost_and_print_stay_out_of_the_content():
    assert content_of(replace(Train(), micro_tokens=7, compile=True, threads=9, log_steps=1)) == content_of(Train())
    assert content_of(replace(Train(), lr=0.5)) != content_of(Train())
    asked = replace(Perturb(), reference_genes=("A", "x.tsv"), published="dkd", budget_hours=1.0, worker_flops=2.0)
    assert content_of(asked) == content_of(Perturb())
    assert content_of(replace(Perturb(), donor="mouse_id")) != content_of(Perturb())


def test_a_later_field_is_in_the_content_only_where_it_is_set():
    assert "cells_share" not in content_of(Train())
    assert content_of(Train(cells_share=0.5))["cells_share"] == 0.5
    assert content_of(Train())["species_mix"] == []  # as recorded by versions in which it was a list
    assert content_of(Source(uri="a", species="human")) == {
        "uri": "a", "species": "human", "name": "", "layer": "X", "genes": "", "sample": "", "obs": [],
    }  # fmt: skip
    assert content_of(Classify(merge={"T": ("a", "b")}), role="cells")["merge"] == {"T": ["a", "b"]}


def test_every_field_of_classify_has_one_role():
    roles = {name: facts.role for name, facts in facts_of(Classify).items()}
    assert set(roles.values()) == {"cells", "asked", "models", "heads", "finetune"}
    assert names(Classify, role="heads") == ("knn", "num_hvgs", "align")
    assert {"temperature", "view", "pooling"} < set(names(Objective, role="contrast"))
    assert names(Train, role="finetune") == ("schedule", "weight_decay", "clip", "precision")


def test_every_local_path_becomes_absolute_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(
        output="run", inputs=Inputs(corpus="c", checkpoint="s3://b/c"), vocab=Vocab(reuse="v"),
        sources=(Source(uri="a.h5ad", species="human", genes="symbol"),),
        classify=Classify(encoders={"mlm": "m/pretrain"}, cells="organ == 'x.tsv'"),
        compare=Compare(encoders={"shared": "s"}, corpora={"shared": "t"}, responses={"human": "h", "mouse": "m"}),
        perturb=Perturb(reference_genes=("INS", "known.tsv")),
    )  # fmt: skip
    found, here = with_absolute_paths(config), str(tmp_path)
    assert found.output == f"{here}/run"
    assert found.inputs == replace(config.inputs, corpus=f"{here}/c")
    assert found.vocab == replace(config.vocab, reuse=f"{here}/v")
    assert found.sources == (replace(config.sources[0], uri=f"{here}/a.h5ad"),)
    assert found.classify == replace(config.classify, encoders={"mlm": f"{here}/m/pretrain"})
    assert found.compare.encoders == {"shared": f"{here}/s"}
    assert found.compare.corpora == {"shared": f"{here}/t"}
    assert found.compare.responses == {"human": f"{here}/h", "mouse": f"{here}/m"}
    assert found.perturb.reference_genes == ("INS", f"{here}/known.tsv")
    assert found.species == config.species
    assert with_absolute_paths(found) == found
    changed = {name for name, part in to_dict(found).items() if part != to_dict(config)[name]}
    assert changed == {"output", "inputs", "vocab", "sources", "classify", "compare", "perturb"}


def test_bounds_hold_for_every_item_and_name_the_field():
    with pytest.raises(UserError, match=r"^classify\.label_shares = 1\.5: must be above 0 and at most 1$"):
        Classify(label_shares=(0.1, 1.5))
    with pytest.raises(UserError, match=r"^train\.species_mix = 0\.0: must be above 0$"):
        Train(species_mix={"human": 1.0, "mouse": 0.0})
    with pytest.raises(UserError, match=r"^perturb\.operations = 'knock': must be one of 'delete', "):
        Perturb(operations=("delete", "knock"))


def test_every_section_is_read_by_a_stage_or_by_all():
    stages = {stage for facts in facts_of(Config).values() for stage in facts.stages}
    read = {name for stage in stages for name in sections_of(Config, stage)}
    assert set(sections()) - read == {"compute", "tracking"}


def test_columns_are_kept_by_their_old_names_and_get_their_new_ones():
    columns = ("cell_type", "donor_id", "n")
    assert Source(uri="a", species="human").kept_columns(columns) == {c: c for c in columns}
    renamed = Source(uri="a", species="human", rename={"donor_id": "donor"})
    assert renamed.kept_columns(columns) == {"cell_type": "cell_type", "donor_id": "donor", "n": "n"}
    assert replace(renamed, obs=("n",)).kept_columns(columns) == {"n": "n", "donor_id": "donor"}
