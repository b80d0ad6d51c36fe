"""The maths of the metrics as pure functions of logits. Any number of leading mask axes."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.core.shapes import Logits, Values


def gather(logits: Logits, tokens: Int[Tensor, "prompt"]) -> Values:
    """The logit of one token a prompt."""
    index = tokens.to(logits.device).expand(logits.shape[:-1])
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def logit_diff(logits: Logits, answers: Int[Tensor, "prompt"], wrongs: Int[Tensor, "prompt"]) -> Values:
    """Logit of the answer minus logit of the wrong token."""
    return gather(logits, answers) - gather(logits, wrongs)


def log_probs(logits: Logits) -> Logits:
    """Log-softmax over the vocabulary, nats."""
    return torch.log_softmax(logits, dim=-1)


def prob_diff(logits: Logits, answers: Int[Tensor, "prompt"], wrongs: Int[Tensor, "prompt"]) -> Values:
    """Probability of the answer minus probability of the wrong token."""
    logs = log_probs(logits)
    return gather(logs, answers).exp() - gather(logs, wrongs).exp()


def kl_divergence(logits: Logits, clean_logits: Logits) -> Values:
    """KL(clean || patched) of the next-token distributions, nats."""
    clean = log_probs(clean_logits)
    return (clean.exp() * (clean - log_probs(logits))).sum(-1)


def answer_rank(logits: Logits, answers: Int[Tensor, "prompt"]) -> Values:
    """How many tokens are more likely than the answer; 0 is on top. Ties count half."""
    answer = gather(logits, answers).unsqueeze(-1)
    return (logits > answer).sum(-1).float() + 0.5 * ((logits == answer).sum(-1) - 1).float()


def accuracy(logits: Logits, answers: Int[Tensor, "prompt"]) -> Values:
    """1 where the answer is the most likely token, else 0."""
    return (logits.argmax(-1) == answers.to(logits.device)).float()
