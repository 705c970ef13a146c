"""Laws of the config: JSON round trip, overrides, refusals that name the field, stable fingerprints."""

import json
import subprocess
import sys

import pytest

from mixgf.config import recipes
from mixgf.config.parse import RENAMED, difference, fingerprint, from_dict, override, to_dict
from mixgf.config.run import Config
from mixgf.errors import UserError


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_recipe_survives_its_json(name):
    config = recipes.get(name)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert config.recipe == name


def test_paper_recipe_holds_the_numbers_of_section_3_3():
    paper = recipes.get("paper")
    assert (paper.model.num_layers, paper.model.num_heads, paper.model.dim, paper.model.activation) == (
        6,
        4,
        256,
        "silu",
    )
    assert (paper.tokens.max_len, paper.train.lr, paper.train.schedule, paper.train.epochs) == (
        2048,
        1e-4,
        "cosine",
        10,
    )
    assert paper.train.batch_cells == 8 * paper.compute.num_workers
    assert (paper.objective.mlm_weight, paper.objective.contrast_weight, paper.objective.mlm_fraction) == (
        1.0,
        1.0,
        0.15,
    )
    assert (paper.classify.epochs, paper.classify.lr, paper.classify.batch_cells, paper.classify.warmup_steps) == (
        10,
        5e-5,
        8,
        500,
    )


def test_ablation_recipes_differ_from_the_paper_only_in_what_they_name():
    paper = to_dict(recipes.get("paper"))
    changed = {line.partition(":")[0] for line in difference(paper, to_dict(recipes.get("paper_mlm_only")))}
    assert changed == {"recipe", "output", "objective.contrast_weight"}


def test_set_replaces_one_field_of_the_right_type():
    config = override(
        Config(),
        ["train.lr=1e-3", "tokens.cls=true", "perturb.genes=STAT1,IRF7+IRF9", "output=runs/x", "train.epochs=3"],
    )
    assert (config.train.lr, config.tokens.cls, config.perturb.genes) == (1e-3, True, ("STAT1", "IRF7+IRF9"))
    assert difference(to_dict(Config()), to_dict(config)) == [
        'output: "runs/default" -> "runs/x"', 'perturb.genes: [] -> ["STAT1", "IRF7+IRF9"]', "tokens.cls: false -> true",
        "train.epochs: 10 -> 3", "train.lr: 0.0001 -> 0.001",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lr=fast", r"train\.lr = 'fast': must be a number"),
        ("train.epochs=1.5", r"train\.epochs = 1\.5: must be a whole number"),
        ("tokens.cls=yes", r"tokens\.cls = 'yes': must be true or false"),
        ("train.learning_rate=1", r"no field 'learning_rate'; known: batch_cells"),
        ("trian.lr=1", r"no section 'trian'; did you mean 'train'\? sections: qc"),
        ("train.lr", r"must look like section\.field=value"),
        ("qc.method=iqr", r"qc\.method = 'iqr': must be one of 'sd', 'mad', 'none'"),
        ("qc.num_sd=0", r"qc\.num_sd = 0(\.0)?: must be above 0"),
        ("qc.num_mads=-1.0", r"qc\.num_mads = -1\.0: must be above 0"),
        ("qc.max_mito_fraction=20.0", r"qc\.max_mito_fraction = 20\.0: must be at least 0 and at most 1"),
        ("qc.min_mapped_fraction=-0.1", r"qc\.min_mapped_fraction = -0\.1: must be at least 0 and at most 1"),
        ("qc.max_cells_per_sample=-1", r"qc\.max_cells_per_sample = -1: must be at least 0"),
        ("model.dim=250", r"model\.dim = 250: must be divisible by model\.num_heads \(4\)"),
        ("objective.pooling=cls", r"objective\.pooling = 'cls': must be used with tokens\.cls = true"),
        (
            'sources=[{"uri": "a.h5ad", "species": "rat"}]',
            r"sources\[0\]\.species = 'rat': must be one of 'human', 'mouse'",
        ),
        (
            'sources=[{"uri": "a.h5ad"}]',
            r"sources\[0\]\.species: missing; an object here has the fields uri, species, name",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_field_value_and_way_out(assignment, message):
    with pytest.raises(UserError, match=message) as caught:
        override(Config(), [assignment])
    assert "\n" not in str(caught.value)


def test_fingerprint_is_the_same_in_every_process_and_refuses_unstable_values():
    code = "from mixgf.config import recipes, parse as config; print(config.fingerprint(config.to_dict(recipes.get('demo'))))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert fingerprint(to_dict(recipes.get("demo"))) == other
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint({"f": print})
    with pytest.raises(ValueError, match="Out of range float"):
        fingerprint({"x": float("nan")})


def test_config_and_cli_import_nothing_heavy():
    code = "import sys, mixgf.cli, mixgf.config.recipes; print([m for m in ('torch','ray','numpy','pyarrow','mlflow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_command_that_prints_a_config_imports_nothing_heavy():
    code = "import sys, mixgf.cli; mixgf.cli.main(['demo', '--print-config']); print([m for m in ('numpy','pyarrow','fsspec') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize("old", RENAMED)
def test_a_field_by_its_former_name_is_refused_with_the_present_one(old):
    section, name = old.split(".")
    now = RENAMED[old].split()[0]
    with pytest.raises(UserError, match=f"^{old}: is now {now}"):
        from_dict(Config, {section: {name: "1"}})
    with pytest.raises(UserError, match=f"{old} is now {now}"):
        override(Config(), [f"{old}=1"])
    assert now.split(".")[1] in to_dict(Config())[section]


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("classify.seeds_per_model=finetune=1, scvi=2", {"finetune": 1, "scvi": 2}),
        ('classify.seeds_per_model={"finetune": 1}', {"finetune": 1}),
        ("classify.encoders=mlm=s3://b/a=b", {"mlm": "s3://b/a=b"}),
        ('classify.merge={"T cell": ["CD4", "CD8"]}', {"T cell": ("CD4", "CD8")}),
        ("train.species_mix=human=0.5,mouse=1", {"human": 0.5, "mouse": 1.0}),
        ("imports.dictionaries=tokens.pkl", {"all": "tokens.pkl"}),
        ("imports.dictionaries=human=a.pkl,b.pkl", {"human": "a.pkl", "all": "b.pkl"}),
        ('tune.space=[{"train.lr": [0.1, 0.2]}]', ({"train.lr": (0.1, 0.2)},)),
        ("embed.layer=all", "all"),
        ("classify.freeze_layers=2", 2),
        ("perturb.null_genes=null", None),
        ("perturb.null_genes=0", 0),
    ],
)
def test_set_reads_mappings_words_and_null(assignment, value):
    section, field = assignment.partition("=")[0].split(".")
    config = override(Config(), [assignment])
    assert getattr(getattr(config, section), field) == value
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ('classify.seeds_per_model=["finetune=1"]', 'must be a JSON object of names and values, here {"finetune": 1}'),
        ('classify.merge=["T=CD4|CD8", "B=B1"]', 'here {"T": ["CD4", "CD8"], "B": ["B1"]}'),
        ('tune.space=["a.b=[1] x c.d=[2]"]', 'must be a JSON object of names and values, here {"a.b": [1], "c.d": [2]}'),
        ("classify.seeds_per_model=finetune", "must be a JSON object of names and values"),
        ("classify.seeds_per_model=finetune=1,finetune=2", "must be a JSON object of names and values"),
        ("classify.seeds_per_model=finetune=0", "classify.seeds_per_model = 0: must be at least 1"),
        ("classify.seeds_per_model=finetune=x", "classify.seeds_per_model[finetune] = 'x': must be a whole number"),
        ('compare.shifts=["a=b -> c"]', "compare.shifts[0] = 'a=b -> c': must be an object with fields name, before, after"),
        ('sources=[{"uri": "a", "species": "human", "obs": ["new=old"]}]', "a column's name; to rename it: rename = old=new"),
        ("compare.corpora=x=y", "compare.corpora = 'x': must be the name of one of compare.encoders"),
        ("embed.layer=0", "embed.layer = 0: must be below 0 or 'second_last' or 'all'"),
        ("embed.layer=last", "embed.layer = 'last': must be a whole number or 'all'"),
        ("classify.freeze_layers=-1", "classify.freeze_layers = -1: must be at least 0 or 'all'"),
        ("perturb.null_genes=-1", "perturb.null_genes = -1: must be at least 0 or null"),
    ],
)  # fmt: skip
def test_a_value_of_another_form_is_refused_with_the_present_form(assignment, message):
    with pytest.raises(UserError) as caught:
        override(Config(), [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["models=knn,tuned", "curve_models=tuned@mlm", "seeds_per_model=tuned=1"])
def test_a_model_by_its_former_name_is_refused_with_the_present_one(field):
    with pytest.raises(UserError, match=r"must be 'finetune_linear_start(@mlm)?', its present name"):
        override(Config(), [f"classify.{field}"])


def test_a_named_value_is_the_value():
    """`second_last` is -2 wherever it is given, so a run with the name continues one with the number."""
    base = Config()
    for text in ("second_last", "-2"):
        made = override(base, [f"perturb.layer={text}", f"embed.layer={text}"])
        assert (made.perturb.layer, made.embed.layer) == (-2, -2)
    assert override(base, ["embed.layer=all"]).embed.layer == "all"
    with pytest.raises(UserError, match=r"perturb\.layer = 'secnd': must be"):
        override(base, ["perturb.layer=secnd"])


def test_a_field_of_all_sources_or_of_one_is_set_by_name():
    config = from_dict(Config, {"sources": [{"uri": f"{n}.h5ad", "species": "human"} for n in "ab"]})
    both = override(config, ["sources.layer=counts", "sources.1.round=true", "sources.0.obs=donor,type"])
    assert [(s.layer, s.round, s.obs) for s in both.sources] == [
        ("counts", False, ("donor", "type")),
        ("counts", True, ()),
    ]
    for wrong in ("sources.2.layer=X", "sources.lay=X", "sources.0.1.layer=X", "sources.-1.layer=X"):
        with pytest.raises(UserError, match=r"sources\.FIELD=value for all sources, or sources\.N\.FIELD=value"):
            override(config, [wrong])
    with pytest.raises(UserError, match="there are 0 sources"):
        override(Config(), ["sources.layer=X"])
