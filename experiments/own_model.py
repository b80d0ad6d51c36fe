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


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.q, self.k, self.v, self.o = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x):
        read = self.ln1(x)
        q, k, v = (part(read).unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(z.transpose(1, 2).flatten(2))
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


def main():
    torch.manual_seed(0)
    model = HookedModel(Own())  # its parts are found by comparing tensors, and proved
    clean, corrupt = torch.randint(0, VOCAB, (2, 32, 6))
    of_clean, of_corrupt = (model.run(ids)[:, -1] for ids in (clean, corrupt))
    prompts = PromptSet(clean, corrupt, of_clean.argmax(-1), (of_corrupt - of_clean).argmax(-1), torch.zeros(32, dtype=torch.long))
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
