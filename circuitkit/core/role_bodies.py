"""What a finding of kind ``roles`` holds: what heads and MLPs do, declared as it stands in its file."""

from __future__ import annotations

from typing import TypedDict


class TokensOfGroup(TypedDict):
    """The tokens of one prompt of a group, and the positions that have labels."""

    tokens: list[str]
    labels: dict[str, int]


class AttentionPattern(TypedDict):
    """Mean attention probabilities of a head over the prompts of a group, [query, key]."""

    group: str
    mean: list[list[float]]


class RoleScores(TypedDict):
    """How much each head plays a role, and the heads that are found to play it, best first."""

    description: str
    scores: dict[str, float]
    found: list[str]


class OVScores(TypedDict):
    """Copy and next scores of every head, in %."""

    k: int
    definition: str
    copy: dict[str, float]
    next: dict[str, float]
    mean_copy: float
    mean_next: float
    n: int


class LogitLens(TypedDict):
    """What the residual stream at the last position would say after each site, a number a site; and where the answer takes over."""

    sites: list[str]
    answer_top1: list[float]
    wrong_top1: list[float]
    answer_logit: list[float]
    wrong_logit: list[float]
    switch: dict[str, int]
    switch_site: str | None
    switch_top1: dict[str, int]
    n: int


class Attribution(TypedDict):
    """Direct logit attribution of every node, and the sum."""

    nodes: dict[str, float]
    total: float
    unit: str


class PlayedRole(TypedDict):
    """How much a head plays a role, and how often keys taken at random score as much."""

    score: float
    chance: float


class RoleParts(TypedDict, total=False):
    """The roles of each head, best first, and the parts that could be made; of others ``skipped`` says why not."""

    heads: dict[str, dict[str, PlayedRole]]
    ov: OVScores
    logit_lens: LogitLens
    attribution: Attribution


class RolesInModel(RoleParts):
    """What heads and MLPs do on some prompts."""

    model: str
    circuit: list[str] | None
    groups: dict[str, TokensOfGroup]
    patterns: dict[str, AttentionPattern]
    roles: dict[str, RoleScores]
    skipped: dict[str, str]


class Roles(RolesInModel):
    """What heads and MLPs do on a task."""

    task: str
