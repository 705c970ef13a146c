"""Cost of a perturbation before it runs: sentences, tokens and FLOP, counted from the design.

The counts are exact without a screen. With a screen, the chosen genes are taken to be like the average gene.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mixgf.arrays import Float64s, Ints
from mixgf.config import perturbation, training
from mixgf.console import duration
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import forward_flops
from mixgf.perturbation import group_design
from mixgf.perturbation.group_design import Design
from mixgf.tracking import cost


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkPart:
    """Work of one kind: sentences, tokens and FLOP."""

    name: str
    sentences: float
    tokens: float
    flops: float


def estimate_work(
    plan: Design, corpus: Corpus, settings: perturbation.Perturb, sizes: training.Model, max_len: int
) -> list[WorkPart]:
    """Work of a design, by part, in the order of execution."""
    layers = sizes.num_layers + 1 + settings.layer
    encoders = 2 if settings.controls else 1  # the untrained twin does the same work
    states = np.unique(np.concatenate([state.cells for state in plan.states]))
    lengths = corpus.lengths_N[states].astype(np.float64)
    parts = [
        WorkPart(
            name="states" + (", both encoders" if settings.controls else ""),
            sentences=encoders * len(states),
            tokens=encoders * lengths.sum(),
            flops=encoders * forward_flops(sizes, lengths, layers=layers),
        )
    ]
    length_N = corpus.lengths_N[plan.cells_N].astype(np.float64)
    one_N = np.array([forward_flops(sizes, [length], layers=layers) for length in length_N])
    width_K = np.array([len(target.tokens) for target in plan.targets])
    held_NW, allowed_NW = _held(plan, corpus, width_K)
    if settings.screen:  # in as many other cells, which are taken to be like these
        genes_N = allowed_NW.sum(axis=1)
        parts += [_screened(name, settings, sizes, layers, length_N, one_N, genes_N) for name in settings.operations]
    share = (
        min(1.0, (settings.screen + settings.screen_sample + settings.num_nulls) / len(plan.targets))
        if settings.screen
        else 1.0
    )
    for operation in settings.operations:
        sentences = tokens = flops = 0.0
        for w, width in enumerate(np.unique(width_K).tolist()):
            groups = [(held_NW[:, w], length_N - width * (operation == "delete"))]
            if operation == "overexpress" and settings.insert_absent:
                groups.append((allowed_NW[:, w] - held_NW[:, w], np.minimum(length_N + width, max_len)))
            for num_N, new_N in groups:
                sentences += num_N.sum()
                tokens += float(num_N @ new_N)
                flops += sum(
                    n * forward_flops(sizes, [x], layers=layers) for n, x in zip(num_N, new_N, strict=True) if n
                )
        of_genes = f"{operation}, {share:.0%} of the genes" if settings.screen else operation
        exact = WorkPart(
            name=of_genes, sentences=sentences * share, tokens=tokens * share, flops=flops * share + one_N.sum()
        )
        parts.append(exact)
        if settings.screen:
            checked = min(1.0, settings.screen_sample / len(plan.targets))
            parts.append(
                WorkPart(
                    name=f"{operation}, sample of the screen", sentences=sentences * checked, tokens=tokens * checked,
                    flops=flops * checked,
                )
            )  # fmt: skip
        if settings.controls:
            parts.append(replace(exact, name=f"{of_genes}, untrained twin"))
    return parts


def _held(plan: Design, corpus: Corpus, width_K: Ints) -> tuple[Float64s, Float64s]:
    """By cell and size of the gene set, (N, W): number of targets in its sentence, and number of targets of its species."""
    widths = np.unique(width_K).tolist()
    owned_KS = group_design.targets_by_species(plan, corpus)
    held_NW = np.zeros((len(plan.cells_N), len(widths)))
    allowed_NW = np.zeros_like(held_NW)
    for w, width in enumerate(widths):
        chosen = width_K == width
        allowed_NW[:, w] = owned_KS[chosen].sum(axis=0)[corpus.species_N[plan.cells_N]]
        genes_KM = plan.genes_KM[chosen][:, :width]
        for n, cell in enumerate(plan.cells_N.tolist()):
            present_V = np.zeros(corpus.vocabulary.size, dtype=bool)
            present_V[corpus.tokens([cell])[0]] = True
            held_NW[n, w] = present_V[genes_KM].all(axis=1).sum()
    return held_NW, allowed_NW


def _screened(  # noqa: PLR0917 (the sums of one caller)
    operation: str,
    settings: perturbation.Perturb,
    sizes: training.Model,
    layers: int,
    length_N: Float64s,
    one_N: Float64s,
    genes_N: Float64s,
) -> WorkPart:
    """Passes of `screen.estimate`: the grid but one, a forward and backward (as three), for overexpression two and the probes."""
    traces = 1 if operation == "delete" else 2
    passes_N = np.minimum(settings.screen_grid, length_N) - 1 + 3 * traces
    flops = float(passes_N @ one_N)
    if operation == "overexpress":
        probe_N = layers * (2 * (4 * sizes.dim**2 + 2 * sizes.dim * sizes.ffn_dim) + 8 * length_N * sizes.dim)
        flops += float(genes_N @ probe_N)
    return WorkPart(
        name=f"{operation}, screen", sentences=passes_N.sum(), tokens=float(passes_N @ length_N), flops=flops
    )


def estimate_text(parts: list[WorkPart], plan: Design, *, rate: float, how: str, num_workers: int, price: float) -> str:
    """Text of the estimate: work, time and cost.

    Args:
        parts: the work.
        plan: the design.
        rate: FLOP/s of one worker.
        how: how the rate was obtained, in words.
        num_workers: workers that share the work.
        price: price of one worker-hour; 0 = unknown.
    """
    flops = sum(part.flops for part in parts)
    took = cost.project(flops, rate=rate, num_nodes=num_workers, price=price or None)
    lines = [f"{len(plan.targets):,} genes in {len(plan.cells_N):,} cells; nothing is written by a dry run", ""]
    lines.append(f"{'':32} {'sentences':>14} {'tokens':>18} {'FLOP':>10}")
    whole = WorkPart(
        name="all",
        sentences=sum(p.sentences for p in parts),
        tokens=sum(p.tokens for p in parts),
        flops=flops,
    )
    lines += [f"{p.name:32} {p.sentences:>14,.0f} {p.tokens:>18,.0f} {p.flops:>10.3g}" for p in [*parts, whole]]
    bill = "not known: perturb.price, of one worker-hour, is not set" if took.cost is None else f"{took.cost:,.2f}"
    return "\n".join([
        *lines, "",
        f"rate   {rate:.3g} FLOP/s per worker, {how}",
        f"time   {duration(took.hours * cost.HOUR)} on {num_workers} workers, {took.node_hours:,.3g} worker-hours",
        f"cost   {bill}",
    ])  # fmt: skip
