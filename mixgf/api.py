"""The Python API: an encoder or a classifier on AnnData, and the stages as functions.

`import mixgf as mg` gives all of it. Numbers equal those of the commands: a cell's vector, label or shift on a CPU is the
same to the bit. Nothing here starts Ray or MLflow unless it is asked for. Errors are one line (`UserError`).

Cells are an AnnData in memory, one that is backed by a file, or a view of either. They may also be the path or URI of an
`.h5ad`, `.zarr`, 10x `.h5` or 10x folder. `embed` and `annotate` read counts in blocks: a backed file of any size needs the memory
of one block and of the result.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from scipy import sparse

from mixgf import console
from mixgf.classification import annotate, kept_classifier
from mixgf.config import parse, recipes
from mixgf.config.data import HUMAN, MOUSE, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.fields import with_absolute_paths
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config
from mixgf.config.training import Embed, LayerChoice
from mixgf.console import Progress, warn
from mixgf.corpus import anndata, in_memory
from mixgf.encoder import bert, checkpoint, huggingface
from mixgf.encoder.embed import embed_cells
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.genes import token_dictionaries, vocabulary
from mixgf.genes.species import gene_table
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import artifacts, files, lease, model_store
from mixgf.tracking import store

if TYPE_CHECKING:
    from anndata import AnnData

    from mixgf.cells.reader import Reader

    Cells: TypeAlias = AnnData | str | os.PathLike[str]
    Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

Engine: TypeAlias = Literal["local", "ray"]
"""Where a stage works: in this process, or on a Ray cluster."""
EMBEDDING = "X_mixgf"
"""Where `inplace=True` writes vectors: `adata.obsm[EMBEDDING]`."""
BLOCK_CELLS = 512
"""Cells whose counts and sentences are held at a time on a CPU."""
GPU_BLOCK_CELLS = 4096
"""The same on a GPU, where cells are packed together."""


# Loading


def load(
    uri: str | os.PathLike[str],
    *,
    device: str | None = None,
    vocabulary: str = "",
    dictionary: str = "",
    medians: str = "",
    cls: bool | None = None,
) -> CellEncoder:
    """Load a trained encoder.

    Args:
        uri: The name of a published model (`push`, `pull`); a run's folder, a
            checkpoint (`OUTPUT/pretrain`), or a Hugging Face folder with config.json and model.safetensors or
            pytorch_model.bin; local or `s3://`.
        device: Of torch, for example `cuda`; None = a GPU where torch finds one, else the CPU.
        vocabulary: URI of the vocabulary that a checkpoint was trained on; empty = the one of the corpus beside it.
        dictionary: For a Hugging Face folder: URI of its token dictionary (gene to id: pickle, JSON, Parquet or TSV);
            empty = token_dictionary.json or .pkl in the folder.
        medians: For a Hugging Face folder: URI of the median of each gene (the same formats), by which its sentences
            are ranked.
        cls: For a Hugging Face folder: whether sentences begin with <cls>; None = where the dictionary has one.

    Raises:
        UserError: there is nothing to load, or its vocabulary, dictionary or medians are missing.

    Examples:
        >>> import mixgf as mg
        >>> encoder = mg.load("runs/mine")
        >>> encoder.species
        ('human', 'mouse')
    """
    console.setup_if_silent()
    uri = model_store.resolve(_uri(uri))
    where = _device(device)
    for place in (uri, files.join(uri, "pretrain")):
        record = artifacts.find(place)
        if record is not None and record.kind == checkpoint.KIND:
            return _load_checkpoint(place, record, where, vocabulary)
    if "config.json" in files.list_dir(uri):
        return _load_huggingface(uri, where, dictionary, medians, cls)
    named = model_store.names()
    there = f"; models with a name: {', '.join(named)}" if named else ""
    msg = f"{uri}: no run, checkpoint or Hugging Face folder there; `mixgf pretrain` makes OUTPUT/pretrain{there}"
    raise UserError(msg)


def _load_checkpoint(uri: str, record: artifacts.Record, device: torch.device, given: str) -> CellEncoder:
    model, _ = checkpoint.load_encoder(uri, device)
    folder = uri.rstrip("/").rpartition("/")[0] or "."
    places = [given] if given else [files.join(folder, name) for name in ("corpus", "vocabulary")]
    wanted = record.details["vocabulary"]
    for place in places:
        if not given and not files.exists(files.join(place, "vocabulary.parquet")):
            continue
        found = Vocabulary.load(place).ancestor(wanted)
        if found is None:
            continue
        made = artifacts.find(place)
        config = made.config if made is not None else {}
        rows = [parse.from_dict(SpeciesRow, row) for row in config.get("species", [])]
        return CellEncoder(
            model, found, parse.from_dict(Tokens, record.details["tokens"]), rows or [HUMAN, MOUSE], uri=uri,
            orthologs=config.get("vocab", {}).get("orthologs"), pooling=_pooling_of(record),
        )  # fmt: skip
    if given:
        msg = f"vocabulary = {given!r}: not the one that {uri} was trained on ({wanted[:12]}); name that one"
        raise UserError(msg)
    msg = f"{uri}: its vocabulary is not beside it (in {' or '.join(places)}); pass vocabulary=URI of its vocabulary.parquet"
    raise UserError(msg)


def _pooling_of(record: artifacts.Record) -> str:
    """`ranked` for a model that was trained on such vectors; `mean` for others, as in `embed.pooling`."""
    return "ranked" if (record.details.get("objective") or {}).get("pooling") == "ranked" else "mean"


def _load_huggingface(
    uri: str,
    device: torch.device,
    dictionary: str,
    medians: str,
    cls: bool | None,  # noqa: FBT001
) -> CellEncoder:
    """Published weights, with a vocabulary made of their token dictionary and medians."""
    published = huggingface.read_pretrained(uri)
    inside = [files.join(uri, name) for name in huggingface.DICTIONARIES if name in files.list_dir(uri)]
    if not dictionary and not inside:
        msg = (
            f"{uri}: no {' or '.join(huggingface.DICTIONARIES)} in it; "
            "pass dictionary=URI of the token dictionary (gene to id) of this model"
        )
        raise UserError(msg)
    tokens_of = token_dictionaries.read_token_dictionary(dictionary or inside[0])
    if not medians:
        msg = f"{uri}: sentences are ranked by the median of each gene; pass medians=URI of the medians of this model"
        raise UserError(msg)
    median_of = token_dictionaries.read_medians(medians)
    if median_of is None:
        msg = f"medians = {medians!r}: no column median; give gene (or key) and median"
        raise UserError(msg)
    rows = (HUMAN, MOUSE)
    known = {row.name: set(gene_table(row)["gene"].to_pylist()) for row in rows}
    by_species: dict[str, dict[str, float]] = {}
    for row in rows:
        genes = token_dictionaries.genes_of_species(tokens_of.genes, row.name, rows, known)
        ranked = {
            gene: median_of[name]
            for name, gene in token_dictionaries.genes_of_species(median_of, row.name, rows, known).items()
        }
        mine = {gene: ranked[gene] for gene in genes.values() if gene in ranked}
        if mine:
            by_species[row.name] = mine
    if not by_species:
        msg = f"medians = {medians!r}: no gene of the dictionary {tokens_of.uri!r} has a median there; name the medians of this model"
        raise UserError(msg)
    tables = {row.name: gene_table(row) for row in rows}
    words = vocabulary.build_vocabulary(by_species, tables, sharing="separate", orthologs={})
    model, _, _ = huggingface.remap_to_vocabulary(published, tokens_of, words, rows, seed=0)
    known_cls = "<cls>" in tokens_of.specials
    if cls and not known_cls:
        msg = "cls = True: this model knows no <cls>; leave it out"
        raise UserError(msg)
    tokens = Tokens(max_len=published.sizes.max_positions, cls=known_cls if cls is None else cls)
    for line in huggingface.CONVENTIONS:
        console.warn(f"load: {line}")
    return CellEncoder(model.encoder.to(device).eval(), words, tokens, rows, uri=uri)


def load_classifier(uri: str | os.PathLike[str], *, device: str | None = None) -> CellClassifier:
    """Load a classifier that `mixgf classify` kept.

    Args:
        uri: The classifier's folder (`OUTPUT/classify/classifiers/GROUP`), or a classification or run with a single one. Or
            the name of a published model (`push`, `pull`).
        device: As of `load`.

    Raises:
        UserError: there is none, or more than one.

    Examples:
        >>> import mixgf as mg
        >>> model = mg.load_classifier("runs/mine/classify/classifiers/pancreas")
        >>> model.classes
        ('alpha cell', 'beta cell', 'ductal cell')
    """
    console.setup_if_silent()
    found = kept_classifier.find(_uri(uri))
    kept, words, _ = kept_classifier.load(found, _device(device))
    return CellClassifier(kept, words, uri=found)


def _uri(uri: str | os.PathLike[str]) -> str:
    return os.fspath(uri).rstrip("/") or "/"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"device = {name!r}: {str(error).splitlines()[0]}"
        raise UserError(msg) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        msg = f"device = {name!r}: torch finds no CUDA GPU here; use device='cpu'"
        raise UserError(msg)
    return device


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Sums of float32 depend on the number of threads: the commands use `train.threads`, 1 unless it is set."""
    if number < 1:
        msg = f"threads = {number}: must be at least 1"
        raise UserError(msg)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _target(data: Cells, *, inplace: bool, copy: bool) -> AnnData | None:
    """The AnnData that receives a result; None where the result is returned."""
    if not inplace and not copy:
        return None
    if inplace and copy:
        msg = "inplace = True, copy = True: give one of them"
        raise UserError(msg)
    if not anndata.is_anndata(data):
        msg = f"{'inplace' if inplace else 'copy'} = True: needs an AnnData; a path gives its result back"
        raise UserError(msg)
    assert not isinstance(data, str | os.PathLike)
    if copy and data.isbacked:
        msg = "copy = True: a backed AnnData cannot be copied in memory; give inplace=True, or use the result"
        raise UserError(msg)
    return data.copy() if copy else data


# Encoder


class CellEncoder:
    """A trained encoder with all that turns raw counts into its sentences. Made by `load`.

    Attributes:
        model: The encoder, on its device, in evaluation mode.
        vocabulary: Genes, tokens and medians.
        tokens: How sentences are made.
        species: Names of the species that it reads.
        width: Numbers in a cell's vector.
        uri: Where it was loaded from.
        pooling: The cell vector that it was trained for: `ranked`, or `mean`.
    """

    def __init__(
        self, model: bert.Encoder, vocabulary: Vocabulary, tokens: Tokens, rows: Sequence[SpeciesRow], *, uri: str = "",
        orthologs: Sequence[str] | None = None, pooling: str = "mean",
    ) -> None:  # fmt: skip
        self.model, self.vocabulary, self.tokens, self.uri = model, vocabulary, tokens, uri
        self.pooling = pooling
        self._rows = tuple(row for row in rows if row.name in vocabulary.species)
        self.species, self.width = tuple(vocabulary.species), model.sizes.dim
        self._orthologs = Vocab().orthologs if orthologs is None else tuple(orthologs)

    def __repr__(self) -> str:
        row = self.model.sizes
        return (
            f"CellEncoder({self.uri!r}: {row.num_layers} layers, width {row.dim}, {self.vocabulary.size:,} tokens, "
            f"{' and '.join(self.species)}, on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.tokens.device

    @overload
    def embed(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., pooling: str = ...,
        hidden_layer: LayerChoice = ..., inplace: Literal[False] = ..., copy: Literal[False] = ..., key_added: str = ...,
        threads: int = ..., precision: str = ...,
    ) -> npt.NDArray[np.float32]: ...  # fmt: skip
    @overload
    def embed(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., pooling: str = ...,
        hidden_layer: LayerChoice = ..., inplace: Literal[True], copy: Literal[False] = ..., key_added: str = ...,
        threads: int = ..., precision: str = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def embed(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., pooling: str = ...,
        hidden_layer: LayerChoice = ..., inplace: Literal[False] = ..., copy: Literal[True], key_added: str = ...,
        threads: int = ..., precision: str = ...,
    ) -> AnnData: ...  # fmt: skip
    def embed(
        self,
        adata: Cells,
        *,
        layer: str = "X",
        genes: str = "",
        species: str = "",
        pooling: str = "",
        hidden_layer: LayerChoice = -1,
        inplace: bool = False,
        copy: bool = False,
        key_added: str = EMBEDDING,
        threads: int = 1,
        precision: str = "fp32",
    ) -> npt.NDArray[np.float32] | AnnData | None:
        """Vectors of all cells, as `mixgf embed` gives them.

        No cell is left out. A cell that holds no gene of the vocabulary gets NaN, and a warning says how many there are.

        Args:
            adata: Cells with raw counts: AnnData (in memory, backed, a view), or a path or URI.
            layer: Where the raw counts are: `X`, `raw`, or the name of a layer.
            genes: Column of var with Ensembl ids or symbols; empty = `ensembl_id` or `gene_ids` where there is such a
                column, else the index.
            species: Of the cells; empty = found by the names of the genes.
            pooling: `mean` over genes, `first` position, `cls`, or `ranked`; empty = `self.pooling`.
            hidden_layer: -1 = the last, -2 = the one before it; "all" = all side by side, the embedding first.
            inplace: Write `adata.obsm[key_added]` and return None.
            copy: Return a copy of `adata` with `obsm[key_added]`.
            key_added: Name in obsm.
            threads: Of torch, on a CPU. Another number than 1 changes the last bits.
            precision: `fp32`, or `bf16` on a GPU.

        Returns:
            float32, (cells, width), in the order of the cells; or as `inplace` and `copy` say.

        Raises:
            UserError: no such layer or species, no known gene, or values that are no counts.

        Examples:
            >>> import mixgf as mg
            >>> adata, encoder = mg.datasets.pancreas()[:20].copy(), mg.load("runs/mine")
            >>> adata.obsm["X_mixgf"] = encoder.embed(adata)
            >>> adata.obsm["X_mixgf"].shape
            (20, 32)
        """
        console.setup_if_silent()
        target = _target(adata, inplace=inplace, copy=copy)
        with anndata.open_cells(adata, layer) as reader:
            out_ND = embed_reader(
                self, reader, species=species, genes=genes, pooling=pooling, hidden_layer=hidden_layer, threads=threads,
                precision=precision,
            )  # fmt: skip
        if target is None:
            return out_ND
        target.obsm[key_added] = out_ND
        return target if copy else None

    def _start(self) -> bert.Encoder:
        """The encoder before training, the control of a perturbation; random weights where no checkpoint says."""
        made = artifacts.find(self.uri) if self.uri else None
        if made is not None and made.kind == checkpoint.KIND:
            return checkpoint.load_start(self.uri, device=self.device)[0]
        return bert.Encoder(self.model.sizes, self.model.vocab_size).to(self.device)

    def perturb(
        self,
        adata: Cells,
        *,
        start: str,
        goal: str = "",
        genes: Sequence[str] = (),
        operations: Sequence[str] = ("delete", "overexpress"),
        layer: str = "X",
        gene_column: str = "",
        species: str = "",
        source: str = "adata",
        label: str = "cell_type",
        seed: int = 0,
        threads: int = 1,
        precision: str = "fp32",
        **settings: Any,
    ) -> pd.DataFrame:
        """Perturb genes in silico; the table of genes that `mixgf perturb` writes.

        All sentences are held in memory, 4 bytes a token. Every cell must hold a gene of the model.

        Args:
            adata: As of `embed`.
            start: Cells that are perturbed: an expression over obs, and over `species` and the columns of quality control.
            goal: Cells that define the goal state; empty = the shift is 1 - cos(original, perturbed).
            genes: Ensembl ids or symbols; `+` joins genes that are perturbed together; empty = all detected genes.
            operations: `delete`, `overexpress`, `inhibit`, `activate`.
            layer: As of `embed`.
            gene_column: As `genes` of `embed`.
            species: As of `embed`.
            source: Value of the column `source` for all cells.
            label: Column of obs with cell types, for `unrelated` states.
            seed: Of the draws of cells and genes.
            threads: As of `embed`.
            precision: As of `embed`.
            settings: Further fields of the config's section `perturb`, for example `max_cells=100`
                (`mixgf perturb --help` lists them).

        Returns:
            One row per gene, species and operation, in the order of the command's table. `attrs["warnings"]` lists what
            speaks against trusting it.

        Raises:
            UserError: an expression that fits no cell, an unknown gene or setting, or cells that cannot be read.

        Examples:
            >>> import mixgf as mg
            >>> adata, encoder = mg.datasets.pancreas(), mg.load("runs/mine")
            >>> table = encoder.perturb(
            ...     adata, start="cell_type == 'alpha cell'", goal="cell_type == 'beta cell'", genes=["INS"],
            ...     operations=["delete"], max_cells=4, unrelated=0,
            ... )
            >>> table[["symbol", "operation"]].to_dict("records")
            [{'symbol': 'INS', 'operation': 'delete'}]
        """
        from mixgf.stages import perturb  # noqa: PLC0415 (heavy)

        console.setup_if_silent()
        named = {"start": start, "goal": goal, "genes": _listed(genes), "operations": _listed(operations)}
        chosen = parse.from_dict(Perturb, settings | named, "perturb")
        base = Config(
            perturb=chosen, seed=seed, tokens=self.tokens, species=self._rows, vocab=Vocab(orthologs=self._orthologs)
        )  # fmt: skip
        config = replace(
            base, train=replace(base.train, threads=threads, precision=precision),
            classify=replace(base.classify, label=label),
        )  # fmt: skip
        with anndata.open_cells(adata, layer) as reader:
            found = in_memory.find_genes(reader, self.vocabulary, self._rows, species=species, column=gene_column)
            in_memory.tell(reader, found, self._rows)
            corpus = in_memory.MemoryCorpus(
                reader, found, self.vocabulary, self.tokens, max_len=self.model.sizes.max_positions, source=source,
                with_counts=bool(goal.strip()),
            )  # fmt: skip
        with _torch_threads(threads), tempfile.TemporaryDirectory(prefix="mixgf-perturb-") as folder:
            tables, warnings = perturb.in_memory(config, corpus, self.model, folder, start=self._start)
        for text in warnings:
            warn(f"perturb: {text}")
        frame = tables["genes"].to_pandas()
        frame.attrs["warnings"] = list(warnings)
        return frame


def _listed(texts: Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def embed_reader(
    encoder: CellEncoder, reader: Reader, *, species: str = "", genes: str = "", pooling: str = "", hidden_layer: LayerChoice = -1,
    threads: int = 1, precision: str = "fp32",
) -> npt.NDArray[np.float32]:  # fmt: skip
    """Vectors of all cells of an open table of counts; arguments and errors as of `CellEncoder.embed`."""
    chosen = parse.from_dict(Embed, {"pooling": pooling or encoder.pooling, "layer": hidden_layer}, "embed")
    bert.require_layer(encoder.model.sizes, chosen.layer, "hidden_layer")
    if pooling == "cls" and not encoder.tokens.cls:
        msg = "pooling = 'cls': this model was trained on sentences without <cls>; use 'mean' or 'first'"
        raise UserError(msg)
    rows = BLOCK_CELLS if encoder.device.type == "cpu" else GPU_BLOCK_CELLS
    width = bert.vector_width(encoder.model.sizes, chosen.layer)
    with _torch_threads(threads):
        found = in_memory.find_genes(reader, encoder.vocabulary, encoder._rows, species=species, column=genes)
        in_memory.tell(reader, found, encoder._rows)
        out_ND = np.full((reader.num_rows, width), np.nan, dtype=np.float32)
        empty = 0
        with Progress("embed", reader.num_rows, "cells") as progress:
            for block in in_memory.blocks(reader, found, encoder.tokens, 0, reader.num_rows, rows=rows):
                full = np.flatnonzero(block.genes_N)
                empty += len(block.genes_N) - len(full)
                out_ND[block.start + full] = embed_cells(
                    encoder.model, block, full, chosen.pooling, chosen.layer, precision=precision
                )
                progress.update(block.start + len(block.genes_N))
    if empty:
        warn(f"embed: {empty:,} of {len(out_ND):,} cells hold no gene of the model: their vectors are NaN")
    return out_ND


# Classifier


class CellClassifier:
    """A classifier with its encoder, and the limits beyond which its labels are doubted. Made by `load_classifier`.

    Attributes:
        kept: Encoder, linear layer and limits.
        vocabulary: Genes, tokens and medians.
        classes: Names of the cell types.
        about: Plain facts: model, species, scores on its test cells.
        uri: Where it was loaded from.
    """

    def __init__(self, kept: kept_classifier.Kept, vocabulary: Vocabulary, *, uri: str = "") -> None:
        self.kept, self.vocabulary, self.uri = kept, vocabulary, uri
        self.classes, self.about = kept.classes, kept.about

    def __repr__(self) -> str:
        species = " and ".join(self.about["species"])
        return f"CellClassifier({self.uri!r}: {self.about['model']}, {len(self.classes)} cell types of {species} cells)"

    @overload
    def annotate(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., inplace: Literal[False] = ...,
        copy: Literal[False] = ..., majority: bool = ..., ontology: str = ..., threads: int = ...,
    ) -> pd.DataFrame: ...  # fmt: skip
    @overload
    def annotate(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., inplace: Literal[True],
        copy: Literal[False] = ..., majority: bool = ..., ontology: str = ..., threads: int = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def annotate(
        self, adata: Cells, *, layer: str = ..., genes: str = ..., species: str = ..., inplace: Literal[False] = ...,
        copy: Literal[True], majority: bool = ..., ontology: str = ..., threads: int = ...,
    ) -> AnnData: ...  # fmt: skip
    def annotate(
        self,
        adata: Cells,
        *,
        layer: str = "X",
        genes: str = "",
        species: str = "",
        inplace: bool = False,
        copy: bool = False,
        majority: bool = False,
        ontology: str = "",
        threads: int = 1,
    ) -> pd.DataFrame | AnnData | None:
        """Label all cells, as `mixgf annotate` does.

        Args:
            adata: As of `CellEncoder.embed`.
            layer: As of `CellEncoder.embed`.
            genes: As of `CellEncoder.embed`.
            species: As of `CellEncoder.embed`.
            inplace: Add the columns to `adata.obs`, the probability of every type to `obsm["mixgf_probabilities"]` and
                facts of the whole to `uns["mixgf_annotate"]`, and return None.
            copy: Return a copy of `adata` with all of these.
            majority: Also label small clusters of cells by the majority of their cells: `mixgf_cluster`, `mixgf_majority`,
                `mixgf_majority_share`.
            ontology: Also give ids of the Cell Ontology: `mixgf_ontology_id`, and `mixgf_term_id` and `mixgf_term`, which cover
                the plausible labels of a doubted cell. `names`, or the path of a table of labels and ids.
            threads: Of torch, on a CPU. Another number than 1 changes the last bits.

        Returns:
            One row per cell: `mixgf_label`, `mixgf_probability`, `mixgf_second`, `mixgf_second_probability`,
            `mixgf_entropy` (nats), `mixgf_distance`, `mixgf_genes`, `mixgf_trusted`, `mixgf_doubt`. Its `attrs["verdicts"]`
            lists what speaks against trusting the labels as a whole. Or as `inplace` and `copy` say.

        Raises:
            UserError: no such layer or species, no known gene, or values that are no counts.

        Examples:
            >>> import mixgf as mg
            >>> adata = mg.datasets.pancreas()[:20]
            >>> labels = mg.load_classifier("runs/mine/classify/classifiers/pancreas").annotate(adata)
            >>> list(labels.columns[:2])
            ['mixgf_label', 'mixgf_probability']
        """
        from mixgf.stages.annotate import PART_CELLS  # noqa: PLC0415 (heavy)

        console.setup_if_silent()
        target = _target(adata, inplace=inplace, copy=copy)
        name = adata if isinstance(adata, str) else anndata.NAME
        source = Source(uri=str(name), species=species, layer=layer, genes=genes, name="mine")
        extras = annotate.Extras(majority=majority, ontology=ontology)
        ids = extras.ids(self.kept)
        with anndata.open_cells(adata, layer) as reader, _torch_threads(threads):
            file, found = annotate.describe(reader, source, self.kept, self.vocabulary)
            in_memory.tell(reader, found, annotate.species_rows(self.kept, self.vocabulary))
            kept = annotate.form_for(reader, found, file, self.kept, axes=majority)
            parts: list[pa.Table] = []
            with Progress("annotate", file.num_cells, "cells") as progress:
                for start in range(
                    0, file.num_cells, PART_CELLS
                ):  # the command's parts: products of matrices are the same
                    stop = min(start + PART_CELLS, file.num_cells)
                    parts += annotate.label_rows(reader, found, kept, start, stop)
                    progress.update(stop)
            names = reader.cell_names(0, file.num_cells)
        table = extras.add(annotate.frame(parts), kept, ids)
        told = annotate.summary(self.uri, kept, file, table)
        for text in told["verdicts"]:
            warn(f"annotate: do not trust without a check: {text}")
        added = annotate.columns(table).set_index(pd.Index(names) if target is None else target.obs_names)
        if target is None:
            added.attrs |= {name: told[name] for name in ("verdicts", "form", "form_model", "why")}
            return added
        for column in added.columns:
            target.obs[column] = added[column].array  # by place: names of cells may repeat
        target.obsm[annotate.OBSM] = annotate.probabilities(table, self.classes, target.obs_names)
        target.uns["mixgf_annotate"] = annotate.facts(told)
        return target if copy else None


# Stages


def _run_stage(  # noqa: PLR0917 (as its callers have them)
    stage: str, recipe: str, output: str | os.PathLike[str], settings: Mapping[str, Any], engine: str, tracking_uri: str
) -> str:
    """Run one stage with the config that the command would have; returns the URI of what it made."""
    console.setup_if_silent()
    if engine not in ("local", "ray"):
        msg = f"engine = {engine!r}: must be local or ray"
        raise UserError(msg)
    changes = dict(settings) | ({"output": os.fspath(output)} if output else {})
    texts = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]
    config = with_absolute_paths(parse.override(recipes.get(recipe), texts))
    tracking = tracking_uri or config.tracking.uri or store.OFF
    config = replace(config, tracking=replace(config.tracking, uri=tracking))
    if engine == "local":
        config = replace(config, compute=replace(config.compute, num_workers=1, min_workers=0))
    with _torch_threads(config.train.threads):
        if stage == "report":
            from mixgf.report import build  # noqa: PLC0415 (heavy)

            return build.build_report(config, files.join(config.output, "report.html"))
        module = importlib.import_module(f"mixgf.stages.{stage}")
        try:
            return str(module.run(config, executor=LocalExecutor() if engine == "local" else None))
        finally:
            lease.release_all()


def prepare(
    sources: Mapping[str, Paths],
    *,
    recipe: str = "default",
    output: str | os.PathLike[str] = "",
    settings: Mapping[str, Any] | None = None,
    engine: Engine = "local",
    tracking_uri: str = "",
) -> str:
    """Turn files of raw counts into a corpus of cell sentences and a vocabulary, as `mixgf prepare`.

    Args:
        sources: By species, the path, glob or URI of a file, or a list of them.
        recipe: Name of the config to start from (`mixgf prepare --help` lists them).
        output: Folder of the run, local or `s3://`; empty = the recipe's.
        settings: Fields of the config to change, with the names of `--set`, for example `{"qc.min_genes": 200}`.
        engine: `local` works in this process; `ray` uses a Ray cluster (RAY_ADDRESS), or starts a local one.
        tracking_uri: An MLflow server or database; empty = no MLflow.

    Returns:
        URI of the corpus.

    Raises:
        UserError: an unknown recipe, field or species, or no source that can be used.

    Examples:
        >>> import mixgf as mg
        >>> mg.prepare(
        ...     {"human": "pancreas.h5ad"}, output="runs/example", settings={"tokens.max_len": 48}
        ... ).rpartition("/")[2]
        'corpus'
    """
    rows = [
        {"species": species, "uri": os.fspath(path)}
        for species, paths in sources.items()
        for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
    ]
    changes = {"sources": rows} | dict(settings or {})
    return _run_stage("prepare", recipe, output, changes, engine, tracking_uri)


def pretrain(
    *,
    recipe: str = "default",
    output: str | os.PathLike[str] = "",
    settings: Mapping[str, Any] | None = None,
    engine: Engine = "local",
    tracking_uri: str = "",
) -> str:
    """Train an encoder on the corpus of a run, as `mixgf pretrain`.

    With `engine="local"` one worker trains in this process. Its numbers are those of the command at
    `compute.num_workers=1`, to the bit; more workers add the same gradients in another order.

    Args:
        recipe: As of `prepare`.
        output: As of `prepare`.
        settings: As of `prepare`, for example `{"train.lr": 1e-3}`.
        engine: As of `prepare`.
        tracking_uri: As of `prepare`.

    Returns:
        URI of the checkpoint; `load` takes it, or the run's folder.

    Raises:
        UserError: no corpus, an unknown field, or a config that cannot be trained.

    Examples:
        >>> import mixgf as mg
        >>> mg.pretrain(
        ...     recipe="demo", output="runs/example", settings={"inputs.corpus": "runs/mine/corpus", "train.max_steps": 2}
        ... ).rpartition("/")[2]
        'pretrain'
    """
    return _run_stage("pretrain", recipe, output, settings or {}, engine, tracking_uri)


def classify(
    *,
    recipe: str = "default",
    output: str | os.PathLike[str] = "",
    settings: Mapping[str, Any] | None = None,
    engine: Engine = "local",
    tracking_uri: str = "",
) -> str:
    """Train and score classifiers of cell types on the corpus of a run, as `mixgf classify`.

    Args:
        recipe: As of `prepare`.
        output: As of `prepare`.
        settings: As of `prepare`, for example `{"classify.models": ["probe"], "classify.label": "cell_type"}`.
        engine: As of `prepare`.
        tracking_uri: As of `prepare`.

    Returns:
        URI of the classification; its classifiers are in `classifiers/GROUP` under it.

    Raises:
        UserError: no corpus or encoder, no labelled cells, or an unknown field.

    Examples:
        >>> import mixgf as mg
        >>> mg.classify(
        ...     output="runs/example",
        ...     settings={
        ...         "inputs.corpus": "runs/mine/corpus", "inputs.checkpoint": "runs/mine/pretrain", "classify.models": ["probe"],
        ...         "classify.splits": ["random"], "classify.group": "source",
        ...     },
        ... ).rpartition("/")[2]
        'classify'
    """
    return _run_stage("classify", recipe, output, settings or {}, engine, tracking_uri)


def write_report(
    *, recipe: str = "default", output: str | os.PathLike[str] = "", settings: Mapping[str, Any] | None = None
) -> str:
    """Write what a run has found as one HTML file, as `mixgf report`.

    Args:
        recipe: As of `prepare`.
        output: As of `prepare`.
        settings: As of `prepare`.

    Returns:
        URI of the file.

    Examples:
        >>> import mixgf as mg
        >>> mg.write_report(output="runs/mine").rpartition("/")[2]
        'report.html'
    """
    return _run_stage("report", recipe, output, settings or {}, "local", "")


def score_perturbations(
    predicted: pd.DataFrame,
    adata: Cells,
    *,
    perturbation: str,
    control: str,
    layer: str = "X",
    signed: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted effects of perturbations against a Perturb-seq data set.

    Args:
        predicted: One row per perturbation, one column per gene, named as in `adata`; in any unit. NaN = no prediction. For
            `perturb/responses.parquet`: `table.pivot_table(index="symbol", columns="responding_symbol", values="change_same_rank")`
            of deletions, with `signed=False`. Overexpression gives the other genes a new rank: take `change`, which includes that.
        adata: Raw counts, as an AnnData or the path of an `.h5ad`.
        perturbation: Column of obs with the perturbed gene of each cell.
        control: Its value for control cells.
        layer: `X`, or the name of a layer.
        signed: Whether predictions have a sign.
        seed: Of the halves into which cells are divided.

    Returns:
        One row per perturbation and metric, and rows `all` with the means: columns perturbation, metric (`correlation`,
        `discrimination`, `overlap`, `direction`), value, mean_response, replicate, and scaled: 0 = the mean effect of the other
        perturbations, 1 = a replicate.

    Raises:
        UserError: no such column or control, or no perturbation or gene in common.

    Examples:
        >>> import mixgf as mg, pandas as pd
        >>> adata = mg.datasets.pancreas()  # cell types in place of perturbations
        >>> predicted = pd.DataFrame(0.0, index=["beta cell", "ductal cell"], columns=adata.var_names)
        >>> found = mg.score_perturbations(predicted, adata, perturbation="cell_type", control="alpha cell")
        >>> sorted(found["metric"].unique())
        ['correlation', 'direction', 'discrimination', 'overlap']
    """
    from mixgf.perturbation import measured_effects  # noqa: PLC0415 (few need it)

    data: Any = adata
    if isinstance(adata, str | os.PathLike):
        from anndata import read_h5ad  # noqa: PLC0415 (heavy)

        data = read_h5ad(adata)
    if perturbation not in data.obs:
        msg = (
            f"perturbation = {perturbation!r}: no such column of obs; there are {', '.join(map(str, data.obs.columns))}"
        )
        raise UserError(msg)
    names_N = data.obs[perturbation].astype(str).to_numpy()
    if control not in names_N:
        msg = f"control = {control!r}: no cell of {perturbation} has this value"
        raise UserError(msg)
    given = data.X if layer == "X" else data.layers[layer]
    if (
        sparse.issparse(given) and given.indices.dtype.kind != "i"
    ):  # files may hold unsigned indices, which scipy warns about
        given = type(given)((given.data, given.indices.astype(np.int64), given.indptr), shape=given.shape)
    counts = sparse.csr_matrix(given)
    genes = pd.Index(data.var_names.astype(str))
    kept = np.isin(names_N, [control, *predicted.index.astype(str)])
    measured = measured_effects.measure(counts[kept], names_N[kept], control, seed=seed)
    shared = genes.intersection(predicted.columns.astype(str))
    if not measured.names or not len(shared):
        what = f"perturbations has {measured_effects.MIN_CELLS} cells" if not measured.names else "genes is"
        number = len(predicted) if not measured.names else predicted.shape[1]
        msg = f"predicted: none of its {number} {what} in the data; name both as there"
        raise UserError(msg)
    table = predicted.set_axis(predicted.index.astype(str)).set_axis(predicted.columns.astype(str), axis=1)
    predicted_PG = table.reindex(index=list(measured.names), columns=genes).to_numpy(np.float64)
    scores = measured_effects.score(predicted_PG, measured, genes.get_indexer(list(measured.names)), signed=signed)
    means = measured_effects.summarise(scores).drop(columns="num_perturbations").assign(perturbation="all")
    return pd.concat([scores, means[scores.columns]], ignore_index=True)


# Models with a name


def push(
    name: str, run: str | os.PathLike[str], *, licence: str, to: str | os.PathLike[str] = "", note: str = "", half: bool = False,
    cells: int | None = None, huggingface: bool = False,
) -> str:  # fmt: skip
    """Publish a run's encoder and classifiers under a name, as `mixgf push`.

    Args:
        name: Of the model.
        run: A run, or a classifier that `mixgf classify` kept.
        licence: Of the weights, for example `MIT`.
        to: A folder or `s3://` prefix that holds models by name, or an MLflow tracker (its registry receives a new version); empty =
            the models of this machine.
        note: What the model is for and what not, for its card.
        half: Store weights in half precision.
        cells: Most training cells that each classifier carries, with their raw counts; None = as it was kept.
        huggingface: Add the encoder as `transformers` reads it.

    Returns:
        URI of the model.

    Raises:
        UserError: nothing to publish, or another model of this name is there.

    Examples:
        >>> import mixgf as mg
        >>> mg.push("mine", "runs/mine", licence="MIT", to="models").rpartition("/")[2]
        'mine'
    """
    from mixgf.stages import publish  # noqa: PLC0415 (heavy)

    asked = publish.Push(
        run=_uri(run), name=name, licence=licence, half=half, cells=cells, huggingface=huggingface, note=note
    )
    return publish.push(asked, os.fspath(to))


def pull(name: str, place: str | os.PathLike[str], *, to: str | os.PathLike[str] = "") -> str:
    """Fetch a published model, with all checksums verified, as `mixgf pull`.

    Args:
        name: Of the model; `NAME@VERSION` of an MLflow registry.
        place: Where it was pushed to.
        to: Folder of models that receives it; empty = that of this machine, where `load` and `load_classifier` find it by name.

    Returns:
        URI of the model.

    Raises:
        UserError: there is no such model, or a file is not as it was pushed.

    Examples:
        >>> import mixgf as mg
        >>> mg.pull("mine", "models", to="pulled").rpartition("/")[2]
        'mine'
    """
    from mixgf.stages import publish  # noqa: PLC0415 (heavy)

    return publish.pull(name, os.fspath(place), os.fspath(to))
