"""The panels of every board, as data: a title, its PromQL, and what the reader should see in it.

Names come from `mixgf.distributed.metrics`, so a renamed metric cannot leave a board behind. Counters are summed over
processes, gauges of a driver taken by their maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.distributed.metrics import METRICS

WINDOW = "$__rate_interval"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: queries with their legends, and how they are shown."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend) pairs."""
    unit: str = "short"
    """Grafana's name of the unit."""
    text: str
    """What the reader should see in it."""
    kind: str = "timeseries"
    """`timeseries` or `stat`."""
    top: float | None = None
    """Largest value of the axis."""
    log: bool = False
    """A logarithmic axis."""
    needs: str = ""
    """`gpu`: empty on a cluster without GPUs."""


def pick(name: str, stage: str = "", **tags: str) -> str:
    """The selector of one of our metrics; tags whose value starts with `~` are regular expressions."""
    parts = [f'stage="{stage}"'] if stage else []
    parts.append('run=~"$run"')
    parts += [f'{k}=~"{v[1:]}"' if v.startswith("~") else f'{k}="{v}"' for k, v in tags.items()]
    return f"{METRICS[name].exported}{{{','.join(parts)}}}"


def rate(name: str, stage: str, by: str = "", **tags: str) -> str:
    """Growth of a counter per second, over all processes."""
    return f"sum{f' by ({by})' if by else ''} (rate({pick(name, stage, **tags)}[{WINDOW}]))"


def top(name: str, stage: str = "", by: str = "run", **tags: str) -> str:
    """A gauge, the largest over processes: a restarted driver's old series is not added to the new one's."""
    return f"max by ({by}) ({pick(name, stage, **tags)})"


def units(stage: str) -> list[Panel]:
    """State of a stage's work units, and the time they will take."""
    left = f"sum(max by (run, state) ({pick('units', stage, state='~waiting|running')}))"
    speed = f"sum(max by (run) (deriv({pick('units', stage, state='done')}[10m])))"
    return [
        Panel(
            title="Work units",
            queries=((f"sum by (state) ({top('units', stage, 'run, state')})", "{{state}}"),),
            text="Waiting goes down, done goes up. Failed should stay at 0: the stage's log names each.",
        ),
        Panel(
            title="Time left",
            queries=((f"{left} / ({speed} > 0)", "left"),),
            unit="s",
            kind="stat",
            text="Units left over the speed of the last 10 minutes; empty while nothing is finished.",
        ),
    ]


def machines() -> list[Panel]:
    """The cluster under a stage."""
    return [
        Panel(
            title="CPU",
            queries=(("avg by (ip) (ray_node_cpu_utilization)", "{{ip}}"),),
            unit="percent",
            top=100,
            text="Per node. Low while units wait: too few workers, or storage is slow.",
        ),
        Panel(
            title="Memory",
            queries=(
                (
                    "max by (ip) (ray_node_mem_used) / max by (ip) (ray_node_mem_total)",
                    "{{ip}}",
                ),
            ),
            unit="percentunit",
            top=1,
            text="Share per node. Ray kills workers above 0.95.",
        ),
        Panel(
            title="GPU use",
            queries=(("avg by (ip, GpuIndex) (ray_node_gpus_utilization)", "{{ip}} {{GpuIndex}}"),),
            unit="percent",
            top=100,
            needs="gpu",
            text="Per GPU. Empty on a cluster without GPUs.",
        ),
        Panel(
            title="GPU memory used",
            queries=(("max by (ip, GpuIndex) (ray_node_gram_used)", "{{ip}} {{GpuIndex}}"),),
            unit="decmbytes",
            needs="gpu",
            text="Per GPU.",
        ),
    ]


def money(stage: str = "") -> list[Panel]:
    """What the runs have cost so far."""
    total = f"sum(max by (run) (max_over_time({pick('cost', stage)}[$__range])))"
    return [
        Panel(
            title="Cost in this range",
            queries=((total, "cost"),),
            kind="stat",
            text="Of the runs seen in the time range, in the price table's currency. Empty without prices (tracking.prices).",
        ),
        Panel(
            title="Cost per hour",
            queries=((f"sum by (run) (max by (run) (deriv({pick('cost', stage)}[5m]))) * 3600", "{{run}}"),),
            text="Speed at which money is spent, by run.",
        ),
    ]


OVERVIEW = [
    *money(),
    Panel(
        title="Nodes",
        queries=(
            (f"max by (node_type) ({pick('nodes')})", "{{node_type}}"),
            ("max(autoscaler_pending_nodes)", "pending"),
        ),
        text="Up, by type, while a run is metered; pending = asked of the cloud and not there yet.",
    ),
    Panel(
        title="Node-hours of running runs",
        queries=((f"sum by (node_type) ({top('node_seconds', '', 'run, node_type')}) / 3600", "{{node_type}}"),),
        unit="h",
        text="What the cost is made of.",
    ),
    Panel(
        title="Work units by stage",
        queries=((f"sum by (stage, state) ({top('units', '', 'run, stage, state')})", "{{stage}} {{state}}"),),
        text="All stages that are running.",
    ),
    Panel(
        title="Cells per second by stage",
        queries=(
            (
                f"sum by (stage) (rate({pick('cells_encoded')}[{WINDOW}]))",
                "{{stage}}",
            ),
            (f"sum by (stage) ({top('cells_per_second', '', 'run, stage')})", "{{stage}}"),
        ),
        unit="cps",
        text="Encoded in prepare and embed, trained on in pretrain.",
    ),
    *machines(),
    Panel(
        title="Disk",
        queries=(("max by (ip) (ray_node_disk_utilization_percentage)", "{{ip}}"),),
        unit="percent",
        top=100,
        text="Per node. Shards go to object storage; a disk fills with logs and spilled objects.",
    ),
    Panel(
        title="Object store",
        queries=(("sum(ray_object_store_used_memory)", "used"), ("sum(ray_object_store_available_memory)", "free")),
        unit="bytes",
        text="mixgf sends little through it; growth here is a fault.",
    ),
]

PREPARE = [
    Panel(
        title="Cells per second",
        queries=((rate("cells_read", "prepare"), "read"), (rate("cells_encoded", "prepare"), "encoded")),
        unit="cps",
        text="Three passes read the same cells: metrics, medians, sentences.",
    ),
    *units("prepare"),
    Panel(
        title="Cells dropped",
        queries=((f"sum by (reason) ({pick('cells_dropped', 'prepare')})", "{{reason}}"),),
        text="By reason, so far. A reason that suddenly grows is a source of another kind.",
    ),
    Panel(
        title="Share of cells kept",
        queries=(
            (
                "sum({0}) / (sum({0}) + sum({1}))".format(
                    pick("cells_kept", "prepare"), pick("cells_dropped", "prepare")
                ),
                "kept",
            ),
        ),
        unit="percentunit",
        kind="stat",
        text="Kept over kept and dropped.",
    ),
    Panel(
        title="Shards written",
        queries=((f"sum({pick('shards_written', 'prepare')})", "shards"),),
        text="Published Parquet shards of this session.",
    ),
    *money("prepare"),
    *machines(),
]

PRETRAIN = [
    Panel(
        title="Loss",
        queries=((top("loss", "pretrain", "run, term"), "{{term}} {{run}}"),),
        log=True,
        text="Total and terms. MLflow has every step; this is the latest logged one.",
    ),
    Panel(
        title="Tokens per second",
        queries=((top("tokens_per_second", "pretrain"), "{{run}}"),),
        unit="cps",
        text="Padding not counted, all workers.",
    ),
    Panel(
        title="Cells per second",
        queries=((top("cells_per_second", "pretrain"), "{{run}}"),),
        unit="cps",
        text="All workers.",
    ),
    Panel(
        title="MFU",
        queries=((top("mfu", "pretrain"), "{{run}}"),),
        unit="percentunit",
        top=1,
        text="Share of the matrix-product peak measured on the same device.",
    ),
    Panel(
        title="Waiting for data",
        queries=((top("data_wait_share", "pretrain"), "{{run}}"),),
        unit="percentunit",
        top=1,
        text="Above 0.1: storage or the loader is the limit, not the GPU.",
    ),
    Panel(
        title="Step",
        queries=((top("train_step", "pretrain"), "{{run}}"),),
        text="Goes back after a restart: to the last checkpoint.",
    ),
    Panel(
        title="Learning rate",
        queries=((top("learning_rate", "pretrain"), "{{run}}"),),
        unit="sci",
        text="Warm-up, then the schedule.",
    ),
    Panel(
        title="Gradient norm",
        queries=((top("grad_norm", "pretrain"), "{{run}}"),),
        log=True,
        text="Before clipping. A rise of tenfold comes before a loss that is not finite.",
    ),
    Panel(
        title="Memory of a worker",
        queries=((top("memory_gigabytes", "pretrain"), "{{run}}"),),
        unit="decgbytes",
        text="Largest so far: the GPU's, or on CPU the process's.",
    ),
    *money("pretrain"),
    *machines(),
]

EMBED = [
    Panel(
        title="Cells per second",
        queries=((rate("cells_encoded", "embed"), "embedded"),),
        unit="cps",
        text="Over all workers.",
    ),
    *units("embed"),
    Panel(
        title="Shards written",
        queries=((f"sum({pick('shards_written', 'embed')})", "shards"),),
        text="Of this session.",
    ),
    *money("embed"),
    *machines(),
]

CLASSIFY = [
    *units("classify"),
    Panel(
        title="Tasks done per hour",
        queries=((f"sum(max by (run) (deriv({pick('units', 'classify', state='done')}[10m]))) * 3600", "tasks"),),
        text="A task is one model on one split of one group with one seed.",
    ),
    Panel(
        title="Failed tasks",
        queries=((f"sum({top('units', 'classify', 'run', state='failed')})", "failed"),),
        kind="stat",
        text="Each is named in the stage's log; the same command tries them again.",
    ),
    *money("classify"),
    *machines(),
]

PERTURB = [
    *units("perturb"),
    Panel(
        title="Sentences per second",
        queries=((rate("sentences_scored", "perturb"), "sentences"),),
        unit="cps",
        text="Perturbed sentences through the encoder, all actors.",
    ),
    Panel(
        title="Actors",
        queries=((f"sum by (state) ({top('actors', 'perturb', 'run, state')})", "{{state}}"),),
        text="Wanted above up for long: the cloud has no nodes of that type, or max_workers is reached.",
    ),
    Panel(
        title="Failed units",
        queries=((f"sum({top('units', 'perturb', 'run', state='failed')})", "failed"),),
        kind="stat",
        text="Dead letters. The same command tries them again.",
    ),
    *money("perturb"),
    *machines(),
]

BOARDS: dict[str, tuple[str, list[Panel]]] = {
    "overview": ("mixgf: overview and cost", OVERVIEW),
    "prepare": ("mixgf: prepare", PREPARE),
    "pretrain": ("mixgf: pretrain", PRETRAIN),
    "embed": ("mixgf: embed", EMBED),
    "classify": ("mixgf: classify", CLASSIFY),
    "perturb": ("mixgf: perturb", PERTURB),
}
