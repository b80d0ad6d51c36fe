"""A model whose heads play known roles, set by hand, and prompts for it. Imported by the tests beside it.

Tokens: 0 begins, 1 to 8 are the members, 9 ends a prompt, 10 ends a sentence, 11 to 15 are fillers. Dimensions 0 to 15 hold the token,
16 to 23 the member that was moved to the last position; the logit of a member is the sum of both.
"""

from __future__ import annotations

import torch
from models_for_tests import linear_llama

from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel

N_MEMBERS, N_TOKENS, LAST, MOVED = 8, 16, 9, 16
SHARP = 200.0

DUPLICATE, PREVIOUS, MOVER, COPY, NEXT = "a0.h0", "a0.h1", "a0.h2", "a1.h0", "a1.h3"


def planted_roles() -> HookedModel:
    """DUPLICATE looks at the same token, PREVIOUS at the member before, MOVER and NEXT from the last position at the newest member. MOVER
    hands it on, NEXT writes its successor, COPY writes whatever it sees. All others look at everything alike and write nothing."""
    model = linear_llama(2, 4, 24, N_TOKENS, d_head=16)
    hf = model.hf.model
    hf.rotary_emb.inv_freq.zero_()  # no positions, so that heads go by content alone
    with torch.no_grad():
        hf.embed_tokens.weight[:, :N_TOKENS] = torch.eye(N_TOKENS)
        model.hf.lm_head.weight[:, :N_TOKENS] = torch.eye(N_TOKENS)
        for member in range(1, N_MEMBERS + 1):
            model.hf.lm_head.weight[member, MOVED + member - 1] = 1.0
        queries, keys, _, _ = _weights(model, 0, 0)
        queries[:, :N_TOKENS], keys[:, :N_TOKENS] = SHARP * torch.eye(16), torch.eye(16)
        queries, keys, _, _ = _weights(model, 0, 1)
        for member in range(1, N_MEMBERS + 1):
            keys[member, member] = 1.0
            if member > 1:
                queries[member - 1, member] = SHARP
        for layer, head in ((0, 2), (1, 3)):
            queries, keys, _, _ = _weights(model, layer, head)
            queries[0, LAST] = SHARP
            keys[0, 1 : N_MEMBERS + 1] = torch.arange(1.0, N_MEMBERS + 1)
        for layer, head, weight, place in ((0, 2, 1.5, MOVED - 1), (1, 0, 1.0, 0), (1, 3, 2.0, 1)):
            _, _, values, out = _weights(model, layer, head)
            for member in range(1, N_MEMBERS + 1):
                values[member, member] = 1.0
                out[member + place, member] = weight
    return model


def _weights(model: HookedModel, layer: int, head: int) -> tuple[torch.Tensor, ...]:
    """Views of a head's query, key and value weights (d_head x d_model) and output weights (d_model x d_head)."""
    attention, rows = model.module(layer, "attention"), slice(16 * head, 16 * head + 16)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return *(each.weight[rows] for each in projections), attention.o_proj.weight[:, rows]


def member_prompts(n: int = 12, seed: int = 0) -> PromptSet:
    """Four members in order, each between a filler and a period; the answer is the next, the wrong answer the last shown."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(n):
        start = 1 + row % 4
        fillers = (11 + torch.randint(0, 5, (4,), generator=generator)).tolist()
        rows.append([0, *(token for place in range(4) for token in (fillers[place], start + place, 10)), LAST])
    starts = torch.tensor([1 + row % 4 for row in range(n)])
    ids = torch.tensor(rows)
    spans = {f"S{place + 1}": (2 + 3 * place,) * 2 for place in range(4)}
    return PromptSet(ids, ids, starts + 4, starts + 3, torch.arange(n) % 2, ("even", "odd"), spans)
