"""Analysis: what each part of a model does, from its attention, its weights and the residual stream."""

from circuitkit.analysis.attention import MeanPattern, mean_patterns
from circuitkit.analysis.direct_attribution import Attribution, direct_attribution
from circuitkit.analysis.logit_lens import LogitLens, logit_lens
from circuitkit.analysis.ov_scores import OVScores, ov_scores
from circuitkit.analysis.roles import OTHER_MEMBER, ROLES, Role, best, chance, repeated_tokens, role_scores

__all__ = [
    "OTHER_MEMBER",
    "ROLES",
    "Attribution",
    "LogitLens",
    "MeanPattern",
    "OVScores",
    "Role",
    "best",
    "chance",
    "direct_attribution",
    "logit_lens",
    "mean_patterns",
    "ov_scores",
    "repeated_tokens",
    "role_scores",
]
