"""The panels of every dashboard as data: title, PromQL queries, and a description.

Names of metrics come from `mixgf.distributed.metrics`, so dashboards follow a renamed metric. Counters are summed over processes.
For gauges of a driver the maximum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.distributed.metrics import METRICS

WINDOW = "$__rate_interval"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: queries with their legends, and their display."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend) pairs."""
    unit: str = "short"
    """Unit, by its name in Grafana."""
    text: str
    """Description: what the panel shows, and what to do about unusual values."""
    kind: str = "timeseries"
    """`timeseries` or `stat`."""
    top: float | None = None
    """Upper end of the axis; None: automatic."""
    log: bool = False
    """A logarithmic axis."""
    needs: str = ""
    """`gpu` for panels without data on a cluster without GPUs."""


def pick(name: str, stage: str = "", **tags: str) -> str:
    """PromQL selector of a metric. Values of tags that start with `~` are regular expressions."""
    parts = [f'stage="{stage}"'] if stage else []
    parts.append('run=~"$run"')
    parts += [f'{k}=~"{v[1:]}"' if v.startswith("~") else f'{k}="{v}"' for k, v in tags.items()]
    return f"{METRICS[name].exported}{{{','.join(parts)}}}"


def rate(name: str, stage: str, by: str = "", **tags: str) -> str:
    """Increase of a counter per second, summed over processes."""
    return f"sum{f' by ({by})' if by else ''} (rate({pick(name, stage, **tags)}[{WINDOW}]))"


def top(name: str, stage: str = "", by: str = "run", **tags: str) -> str:
    """Maximum of a gauge over processes, so that the old series of a restarted driver is not added to the new one."""
    return f"max by ({by}) ({pick(name, stage, **tags)})"


def units(stage: str) -> list[Panel]:
    """Panels of a stage's work units and remaining time."""
    left = f"sum(max by (run, state) ({pick('units', stage, state='~waiting|running')}))"
    speed = f"sum(max by (run) (deriv({pick('units', stage, state='done')}[10m])))"
    return [
        Panel(
            title="Work units",
            queries=((f"sum by (state) ({top('units', stage, 'run, state')})", "{{state}}"),),
            text="Waiting falls and done rises. Failed should stay at 0; the log of the stage names every failed unit.",
        ),
        Panel(
            title="Time left",
            queries=((f"{left} / ({speed} > 0)", "left"),),
            unit="s",
            kind="stat",
            text="Remaining units divided by the rate of the last 10 minutes. No data until the first unit is finished.",
        ),
    ]


def machines() -> list[Panel]:
    """Panels of the machines of the cluster."""
    return [
        Panel(
            title="CPU",
            queries=(("avg by (ip) (ray_node_cpu_utilization)", "{{ip}}"),),
            unit="percent",
            top=100,
            text="Per node. A low value while units wait means too few workers or slow storage.",
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
            text="Used share per node. Above 0.95 Ray stops workers.",
        ),
        Panel(
            title="GPU use",
            queries=(("avg by (ip, GpuIndex) (ray_node_gpus_utilization)", "{{ip}} {{GpuIndex}}"),),
            unit="percent",
            top=100,
            needs="gpu",
            text="Per GPU. No data on a cluster without GPUs.",
        ),
        Panel(
            title="GPU memory used",
            queries=(("max by (ip, GpuIndex) (ray_node_gram_used)", "{{ip}} {{GpuIndex}}"),),
            unit="decmbytes",
            needs="gpu",
            text="Per GPU. No data on a cluster without GPUs.",
        ),
    ]


def money(stage: str = "") -> list[Panel]:
    """Panels of the cost of runs."""
    total = f"sum(max by (run) (max_over_time({pick('cost', stage)}[$__range])))"
    return [
        Panel(
            title="Cost in this range",
            queries=((total, "cost"),),
            kind="stat",
            text="Cost of the runs in the time range, in the currency of the price table. No data without a price table (tracking.prices).",
        ),
        Panel(
            title="Cost per hour",
            queries=((f"sum by (run) (max by (run) (deriv({pick('cost', stage)}[5m]))) * 3600", "{{run}}"),),
            text="Current cost per hour, by run.",
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
        text="Nodes that are up, by type, while a run is measured. Pending: requested from the cloud and not started yet.",
    ),
    Panel(
        title="Node-hours of running runs",
        queries=((f"sum by (node_type) ({top('node_seconds', '', 'run, node_type')}) / 3600", "{{node_type}}"),),
        unit="h",
        text="Hours of nodes by type, from which the cost is computed.",
    ),
    Panel(
        title="Work units by stage",
        queries=((f"sum by (stage, state) ({top('units', '', 'run, stage, state')})", "{{stage}} {{state}}"),),
        text="Work units of all running stages, by state.",
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
        text="Cells that are encoded (prepare, embed) or trained on (pretrain).",
    ),
    *machines(),
    Panel(
        title="Disk",
        queries=(("max by (ip) (ray_node_disk_utilization_percentage)", "{{ip}}"),),
        unit="percent",
        top=100,
        text="Used share per node. Shards go to object storage, so a disk fills with logs and spilled objects.",
    ),
    Panel(
        title="Object store",
        queries=(("sum(ray_object_store_used_memory)", "used"), ("sum(ray_object_store_available_memory)", "free")),
        unit="bytes",
        text="Memory of Ray's object store. mixgf uses little of it; steady growth is a fault.",
    ),
]

PREPARE = [
    Panel(
        title="Cells per second",
        queries=((rate("cells_read", "prepare"), "read"), (rate("cells_encoded", "prepare"), "encoded")),
        unit="cps",
        text="Cells read and encoded. Three passes read the same cells: quality metrics, medians, sentences.",
    ),
    *units("prepare"),
    Panel(
        title="Cells dropped",
        queries=((f"sum by (reason) ({pick('cells_dropped', 'prepare')})", "{{reason}}"),),
        text="Total by reason. A reason that rises suddenly points to a source of a different kind.",
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
        text="Kept cells divided by kept and dropped cells.",
    ),
    Panel(
        title="Shards written",
        queries=((f"sum({pick('shards_written', 'prepare')})", "shards"),),
        text="Finished Parquet shards of this session.",
    ),
    *money("prepare"),
    *machines(),
]


def training(stage: str) -> list[Panel]:
    """Panels of a stage that trains a model."""
    return [
        Panel(
            title="Loss",
            queries=((top("loss", stage, "run, term"), "{{term}} {{run}}"),),
            log=True,
            text="Total loss and its terms at the latest logged step. MLflow has every step.",
        ),
        Panel(
            title="Tokens per second",
            queries=((top("tokens_per_second", stage), "{{run}}"),),
            unit="cps",
            text="Sum over all workers, without padding.",
        ),
        Panel(
            title="Cells per second",
            queries=((top("cells_per_second", stage), "{{run}}"),),
            unit="cps",
            text="Sum over all workers.",
        ),
        Panel(
            title="MFU",
            queries=((top("mfu", stage), "{{run}}"),),
            unit="percentunit",
            top=1,
            text="Model FLOPs utilisation: share of the peak of matrix products measured on the same device.",
        ),
        Panel(
            title="Waiting for data",
            queries=((top("data_wait_share", stage), "{{run}}"),),
            unit="percentunit",
            top=1,
            text="Share of time that training waits for data. Above 0.1, storage or the loader limits the speed, not the GPU.",
        ),
        Panel(
            title="Step",
            queries=((top("train_step", stage), "{{run}}"),),
            text="Optimizer step. After a restart it goes back to the last checkpoint.",
        ),
        Panel(
            title="Learning rate",
            queries=((top("learning_rate", stage), "{{run}}"),),
            unit="sci",
            text="Learning rate: warm-up, then the schedule.",
        ),
        Panel(
            title="Gradient norm",
            queries=((top("grad_norm", stage), "{{run}}"),),
            log=True,
            text="Gradient norm before clipping. A tenfold rise often comes before a loss that is not finite.",
        ),
        Panel(
            title="Memory of a worker",
            queries=((top("memory_gigabytes", stage), "{{run}}"),),
            unit="decgbytes",
            text="Largest use so far: GPU memory, or memory of the process on CPU.",
        ),
        *money(stage),
        *machines(),
    ]


PRETRAIN, FINETUNE = training("pretrain"), training("finetune")

EMBED = [
    Panel(
        title="Cells per second",
        queries=((rate("cells_encoded", "embed"), "embedded"),),
        unit="cps",
        text="Cells embedded, sum over all workers.",
    ),
    *units("embed"),
    Panel(
        title="Shards written",
        queries=((f"sum({pick('shards_written', 'embed')})", "shards"),),
        text="Finished Parquet shards of this session.",
    ),
    *money("embed"),
    *machines(),
]

CLASSIFY = [
    *units("classify"),
    Panel(
        title="Tasks done per hour",
        queries=((f"sum(max by (run) (deriv({pick('units', 'classify', state='done')}[10m]))) * 3600", "tasks"),),
        text="Finished tasks per hour. A task is one model on one split of one group with one seed.",
    ),
    Panel(
        title="Failed tasks",
        queries=((f"sum({top('units', 'classify', 'run', state='failed')})", "failed"),),
        kind="stat",
        text="The log of the stage names every failed task. Run the same command to try them again.",
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
        text="Perturbed sentences that pass the encoder, sum over all actors.",
    ),
    Panel(
        title="Actors",
        queries=((f"sum by (state) ({top('actors', 'perturb', 'run, state')})", "{{state}}"),),
        text="If wanted stays above up, the cloud has no nodes of that type, or max_workers is reached.",
    ),
    Panel(
        title="Failed units",
        queries=((f"sum({top('units', 'perturb', 'run', state='failed')})", "failed"),),
        kind="stat",
        text="Units that failed after all retries. Run the same command to try them again.",
    ),
    *money("perturb"),
    *machines(),
]

TUNE = [
    *units("tune"),
    Panel(
        title="Score of each arm",
        queries=((top("arm_score", "tune", "run, arm"), "{{arm}}"),),
        text="Mean over seeds at the last rung that the arm has passed, on the cells that choose. An arm is named by its hyperparameters.",
    ),
    Panel(
        title="Rungs passed",
        queries=((top("arm_rungs", "tune", "run, arm"), "{{arm}}"),),
        text="An arm that was stopped stays at its last rung. Not all arms are there before the first rung.",
    ),
    *money("tune"),
    *machines(),
]

DASHBOARDS: dict[str, tuple[str, list[Panel]]] = {
    "overview": ("mixgf: overview and cost", OVERVIEW),
    "prepare": ("mixgf: prepare", PREPARE),
    "pretrain": ("mixgf: pretrain", PRETRAIN),
    "embed": ("mixgf: embed", EMBED),
    "classify": ("mixgf: classify", CLASSIFY),
    "finetune": ("mixgf: finetune", FINETUNE),
    "perturb": ("mixgf: perturb", PERTURB),
    "tune": ("mixgf: tune", TUNE),
}
