"""Knock-outs and a circuit in a model of one's own: any module that maps token ids to logits, written here with plain torch.

    python experiments/own_model.py
"""

import torch
from torch import nn

from circuitkit.core.prompts import PromptSet
from circuitkit.engine import PackedEngine
from circuitkit.methods import IterativePruning, Knockout
from circuitkit.metrics import LogitDiff
from circuitkit.models import HookedModel
from circuitkit.patchers import Mean

VOCAB, D_MODEL, N_HEADS = 29, 24, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.attention, self.ln2 = nn.LayerNorm(D_MODEL), Attention(), nn.LayerNorm(D_MODEL)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Own(nn.Module):
    def __init__(self, n_layers=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(32, D_MODEL)
        self.blocks, self.ln = nn.ModuleList(Block() for _ in range(n_layers)), nn.LayerNorm(D_MODEL)
        self.unembed = nn.Linear(D_MODEL, VOCAB, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.ln(x))


def trained(steps=300):
    """A model that says the first token again."""
    model = Own()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (64, 6))
        loss = nn.functional.cross_entropy(model(ids)[:, -1], ids[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def main():
    torch.manual_seed(0)
    model = HookedModel(trained())  # its parts are found by comparing tensors, and proved
    clean = torch.randint(0, VOCAB, (32, 6))
    corrupt = clean.clone()
    corrupt[:, 0] = (clean[:, 0] + 1 + torch.randint(0, VOCAB - 1, (32,))) % VOCAB  # another first token
    prompts = PromptSet(clean, corrupt, clean[:, 0], corrupt[:, 0], torch.zeros(32, dtype=torch.long))
    engine = PackedEngine(model, prompts, Mean(), LogitDiff())
    engine.check()  # against the naive path: one mask a forward, plain hooks
    scores = Knockout().discover(engine, on_step=lambda step: None)
    circuit = IterativePruning(threshold=0.8).discover(engine, on_step=lambda step: None)
    return scores, circuit


if __name__ == "__main__":
    found, kept = main()
    for name, score in found.values.items():
        print(f"without {name:6} {score:6.1f} %")
    print(f"circuit at {kept.score:.1f} %: {', '.join(kept.names)}")
