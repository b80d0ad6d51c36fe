"""What each kind of finding holds, declared once, as it stands in its file. What is not measured is null.

What is declared with ``total=False`` is only there in some cases, or not in files of earlier versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from circuitkit.core.role_bodies import Roles


class Estimate(TypedDict):
    """An estimate, in % unless said otherwise, and the ends of its interval; these are null where there are too few prompts for one."""

    value: float
    low: float | None
    high: float | None


# Evaluation


class Drop(Estimate):
    """What is left of the score without a member, and how many points less that is, likewise with the ends of its interval."""

    drop: float
    drop_low: float | None
    drop_high: float | None


class CircuitEdges(TypedDict, total=False):
    """What is said of circuits of edges besides."""

    level: str
    edges: list[str]
    n_edges: int


class CircuitSize(TypedDict, total=False):
    """What is said of circuits of neither heads and MLPs nor edges besides: how many members of which kind."""

    size: str


class EvaluatedCircuit(CircuitEdges, CircuitSize):
    """The circuit that an evaluation is of."""

    label: str
    nodes: list[str]
    n_heads: int
    n_mlps: int


class Frame(TypedDict, total=False):
    """Between which components the edges of a circuit were searched, and how many edges there are between them."""

    frame: list[str]
    frame_edges: int


class Normalisation(TypedDict, total=False):
    """What counts as 0 % of the score: the name of the choice, and the score as a formula."""

    zero: str
    formula: str


class Measure(Normalisation):
    """What was measured, on how many prompts, and its mean with the untouched and the fully patched model."""

    metric: str
    unit: str
    n_prompts: int
    clean_mean: float
    patched_mean: float


class PromptScores(TypedDict):
    """The metric of one prompt, with the untouched model and with the circuit alone."""

    text: str
    group: str
    clean: float
    circuit: float


class RandomHead(TypedDict):
    """What any head is worth alone: the mean over all, gains counted as 0, and the drop of each."""

    mean_drop: float | None
    n: int
    drops: dict[str, float]


class RandomCircuits(TypedDict):
    """Scores of random circuits of the same size, and the share of them that is at least as good, which is a p-value."""

    scores: list[float]
    mean: float
    share_as_good: float


class RemovedSetControls(TypedDict, total=False):
    """Of a set how its controls compare; of the controls their scores and how many of the set's members they have on average."""

    share_as_bad: float
    scores: list[float]
    in_common: float


class RemovedSet(RemovedSetControls):
    """What is left when a set is removed at once; ``control_of`` names the set whose random controls these are."""

    label: str
    nodes: list[str]
    score: Estimate
    control_of: str | None


class Evaluation(Frame, Measure):
    """How much of the score a circuit has alone, what each member is worth, and how random circuits do."""

    circuit: EvaluatedCircuit
    task: str
    model: str
    score: Estimate
    confidence: float
    resamples: int
    prompts: list[PromptScores]
    removed_from_circuit: dict[str, Drop]
    removed_from_model: dict[str, Drop]
    random_head: RandomHead
    random_circuits: RandomCircuits
    sets_removed_from_model: list[RemovedSet]


# Several circuits


class LevelOfEdges(TypedDict, total=False):
    """The level, of circuits of edges alone."""

    level: str


class CrossTask(LevelOfEdges):
    """Every circuit (a row of ``percent``) on the prompts of every task (a column)."""

    model: str
    circuits: list[str]
    controls: list[str]
    tasks: list[str]
    percent: list[list[Estimate]]
    n_prompts: dict[str, int]
    members: dict[str, list[str]]
    random_scores: dict[str, dict[str, list[float]]]
    draws: int
    confidence: float
    resamples: int


class ComparedEdges(TypedDict, total=False):
    """What is said of circuits of edges besides."""

    n_edges: int
    edges: list[str]


class ComparedCircuit(ComparedEdges):
    """One circuit of a comparison."""

    model: str
    heads: int
    mlps: int
    score: float | None
    nodes: list[str]


class Pair(TypedDict):
    """The overlap of two circuits."""

    a: str
    b: str
    shared: int
    jaccard: float
    containment: float | None
    p_value: float | None


class EdgeCount(TypedDict, total=False):
    """Of circuits of edges alone."""

    edges: int


class MemberCounts(EdgeCount):
    """Of what there can be in a circuit, how much there is."""

    heads: int
    mlps: int


class Comparison(LevelOfEdges):
    """What circuits of one model share."""

    circuits: dict[str, ComparedCircuit]
    pairs: list[Pair]
    shared_by_all: list[str]
    union: list[str]
    universe: MemberCounts


class RunEdges(TypedDict, total=False):
    """Of a search for edges alone."""

    edges: list[str]


class StabilityRun(RunEdges):
    """One of the repeated searches; settings that it has not are null."""

    label: str
    corruption: str | None
    seed: int | None
    order: str | None
    threshold: float | None
    score: float | None
    nodes: list[str]


class Share(TypedDict):
    """In which share of the runs something was found."""

    share: float


class EdgeShares(TypedDict, total=False):
    """Of circuits of edges alone."""

    edges: dict[str, Share]


class Stability(EdgeShares):
    """What repeated searches found again."""

    task: str
    model: str
    runs: list[StabilityRun]
    nodes: dict[str, Share]
    survive_all: list[str]
    survive_corruptions: list[str]
    mean_jaccard: dict[str, float | None]


# Searches of edges, transfer


class EdgeSearch(TypedDict):
    """What a search for edges found; what its method does not say is null."""

    task: str
    model: str
    nodes: list[str]
    level: str
    rule: str | None
    mlps: str | None
    threshold: float | None
    node_score: float | None
    dropped_nodes: list[str] | None
    score: float | None
    edges: dict[str, float]
    kept: list[str]


class DrawnComponents(TypedDict, total=False):
    """The members of each draw, of a control alone."""

    drawn: list[list[str]]


class RemovedComponents(DrawnComponents):
    """Components that are removed together, or several random draws of as many."""

    label: str
    control: bool
    draws: int
    n_heads: int
    n_mlps: int
    nodes: list[str]


class AskedTask(TypedDict):
    """How many questions were asked, and how many of them the untouched model solves."""

    name: str
    asked: int
    solved: int
    clean_accuracy: float | None


class LeftOutTask(AskedTask):
    """A question set that was left out, and why."""

    reason: str


class Accuracy(TypedDict):
    """Share of right answers, the ends of its interval, and of each draw."""

    mean: float
    low: float
    high: float
    draws: list[float]


class Generation(TypedDict):
    """What the model said to a question without a set of components."""

    task: str
    prompt: str
    answer: str
    set: str
    generated: str


class Transfer(TypedDict):
    """What a model still answers when sets of components are removed; ``accuracy`` by task and set."""

    model: str
    patcher: str
    mlps: bool
    confidence: float
    seed: int
    sets: list[RemovedComponents]
    tasks: list[AskedTask]
    left_out: list[LeftOutTask]
    accuracy: dict[str, dict[str, Accuracy]]
    examples: list[Generation]


BODIES: Mapping[str, type] = {
    "evaluation": Evaluation,
    "cross_task": CrossTask,
    "compare": Comparison,
    "stability": Stability,
    "edges": EdgeSearch,
    "roles": Roles,
    "transfer": Transfer,
}
"""Kind of finding, which is the name of its file, to what its body holds."""
