"""The maths of the metrics as pure functions of logits. Any number of leading mask axes.

Answers are weighted sets of tokens. Sets of one token of weight 1 are looked up and not summed, so their numbers are those of the token
to the last bit.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.core.shapes import Logits, Values
from circuitkit.core.token_sets import TokenSets


def gather(logits: Logits, tokens: Int[Tensor, " prompt"]) -> Values:
    """The logit of one token per prompt."""
    index = tokens.to(logits.device).expand(logits.shape[:-1])
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def log_probs(logits: Logits) -> Logits:
    """Log-softmax over the vocabulary, nats."""
    return torch.log_softmax(logits, dim=-1)


def log_mass(logits: Logits, sets: TokenSets) -> Values:
    """Log of the weighted sum of the exponentiated logits of a set: the logit of the set taken as one token."""
    if sets.is_single:
        return gather(logits, sets.tokens)
    return torch.logsumexp(_each(logits, sets) + sets.weights.to(logits).log(), dim=-1)


def mass(logs: Logits, sets: TokenSets) -> Values:
    """Weighted probability of a set, given log-probabilities."""
    if sets.is_single:
        return gather(logs, sets.tokens).exp()
    return (_each(logs, sets).exp() * sets.weights.to(logs)).sum(-1)


def logit_diff(logits: Logits, answers: TokenSets, wrongs: TokenSets) -> Values:
    """Logit of the answers minus logit of the wrong answers, each set taken as one token: the log of the ratio of their probabilities."""
    return log_mass(logits, answers) - log_mass(logits, wrongs)


def prob_diff(logits: Logits, answers: TokenSets, wrongs: TokenSets) -> Values:
    """Probability of the answers minus probability of the wrong answers."""
    logs = log_probs(logits)
    return mass(logs, answers) - mass(logs, wrongs)


def log_prob(logits: Logits, answers: TokenSets) -> Values:
    """Log-probability of the answers together, nats."""
    return log_mass(log_probs(logits), answers)


def continuation_log_prob(logits: Float[Tensor, "*mask prompt step d_vocab"], targets: Int[Tensor, "prompt step"], *, mean: bool) -> Values:
    """Log-probability of answers of several tokens by teacher forcing, nats: the sum over their tokens, or the mean. -1 is no token."""
    steps = (targets >= 0).to(logits.device)
    index = targets.clamp(min=0).to(logits.device).expand(logits.shape[:-1])
    logs = torch.log_softmax(logits, dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    total = torch.where(steps, logs, 0.0).sum(-1)
    return total / steps.sum(-1) if mean else total


def kl_divergence(logits: Logits, clean_logits: Float[Tensor, "prompt d_vocab"]) -> Values:
    """KL(clean || patched) of the next-token distributions, nats."""
    clean = log_probs(clean_logits)
    return (clean.exp() * (clean - log_probs(logits))).sum(-1)


def answer_rank(logits: Logits, answers: TokenSets) -> Values:
    """How many tokens are more likely than the likeliest answer; 0 is on top. Ties with other tokens count half."""
    if answers.is_single:
        answer = gather(logits, answers.tokens).unsqueeze(-1)
        return (logits > answer).sum(-1).float() + 0.5 * ((logits == answer).sum(-1) - 1).float()
    members = _each(logits, answers).masked_fill(answers.weights.to(logits.device) == 0, -torch.inf)
    best = members.amax(-1, keepdim=True)
    ties = (logits == best).sum(-1) - (members == best).sum(-1)
    return (logits > best).sum(-1).float() + 0.5 * ties.float()


def accuracy(logits: Logits, answers: TokenSets) -> Values:
    """1 where the most likely token is one of the answers, else 0."""
    return is_top(logits, answers).float()


def is_top(logits: Logits, answers: TokenSets) -> Bool[Tensor, "*mask prompt"]:
    """Whether the most likely token is one of the answers."""
    return answers.have(logits.argmax(-1))


def _each(logits: Logits, sets: TokenSets) -> Tensor:
    """The logit of every token of a set, padding included: shape ``*mask prompt choice``."""
    index = sets.ids.to(logits.device)
    return logits.gather(-1, index.expand(*logits.shape[:-1], index.shape[1]))
