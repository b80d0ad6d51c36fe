"""Models written with plain torch, as in a notebook, and their maps. Imported by the tests beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from circuitkit.models.model_map import Addend, Block, Heads, ModelMap, Projection

VOCAB, D_MODEL, N_HEADS, D_HEAD = 17, 12, 3, 4


class Attention(nn.Module):
    """Heads with fused queries, keys and values; gives a tensor."""

    def __init__(self, causal: bool = True):
        super().__init__()
        self.causal = causal
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, stream: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (N_HEADS, D_HEAD)).transpose(1, 2) for part in self.qkv(stream).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(z.transpose(1, 2).flatten(-2))


class RunningMean(nn.Module):
    """Mixes positions without heads; gives what is added, a state, and a count."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, stream: Tensor) -> tuple[Tensor, Tensor, int]:
        state = self.into(stream).cumsum(1)
        return state / torch.arange(1, stream.shape[1] + 1)[:, None], state, stream.shape[1]


class Mlp(nn.Module):
    """With the names that nnsight takes for itself."""

    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Linear(D_MODEL, 2 * D_MODEL), nn.Linear(2 * D_MODEL, D_MODEL)

    def forward(self, stream: Tensor) -> Tensor:
        return self.output(torch.relu(self.input(stream)))


class Layer(nn.Module):
    """A block that gives a pair. Its attention is heads, a mixer or missing; its MLP may be missing too."""

    def __init__(self, attention: nn.Module | None, mlp: nn.Module | None):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)])
        self.attention, self.mlp = attention, mlp

    def forward(self, stream: Tensor) -> tuple[Tensor, None]:
        if self.attention is not None:
            out = self.attention(self.norms[0](stream))
            stream = stream + (out[0] if isinstance(out, tuple) else out)
        if self.mlp is not None:
            stream = stream + self.mlp(self.norms[1](stream))
        return stream, None


class Own(nn.Module):
    """A whole model: token ids to logits, with no argument besides.

    Args:
        kinds: For each layer ``h`` (heads) or ``x`` (a mixer), then ``m`` where it has an MLP, such as ``("hm", "xm", "m", "h")``.
        causal: Whether heads see earlier positions alone.
    """

    def __init__(self, kinds: tuple[str, ...] = ("hm", "hm"), causal: bool = True, seed: int = 0):
        super().__init__()
        self.kinds, self.causal = kinds, causal
        self.embed, self.place = nn.Embedding(VOCAB, D_MODEL), nn.Embedding(16, D_MODEL)
        made = {"h": lambda: Attention(causal), "x": RunningMean, "m": lambda: None}
        self.layers = nn.ModuleList([Layer(made[kind[0]](), Mlp() if "m" in kind else None) for kind in kinds])
        self.last, self.unembed = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCAB)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                one = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else one + 0.2 * noise)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            stream, _ = layer(stream)
        return self.unembed(self.last(stream))


def map_by_hand(model: Own) -> ModelMap:
    """The map of such a model."""
    return ModelMap(
        family="own",
        blocks=tuple(_block(f"layers.{layer}", kind) for layer, kind in enumerate(model.kinds)),
        embed="embed",
        final_norm="last",
        unembed="unembed",
        causal=model.causal,
        forward=frozenset(),
        logits=False,
        caches=False,
        interface=False,
    )


def _block(path: str, kind: str) -> Block:
    ports = [Projection(f"{path}.attention.qkv", tuple(range(at * D_MODEL, (at + 1) * D_MODEL, D_HEAD)), D_HEAD) for at in range(3)]
    heads = Heads(f"{path}.attention.out", N_HEADS, N_HEADS, D_HEAD, D_HEAD, *ports, pattern=False)
    norm = f"{path}.norms.0"
    attentions = {"h": Addend(f"{path}.attention", norm=norm), "x": Addend(f"{path}.attention", 0, 3, norm=norm), "m": None}
    mlp = Addend(f"{path}.mlp", norm=f"{path}.norms.1") if "m" in kind else None
    return Block(
        path, attentions[kind[0]], heads if kind[0] == "h" else None, mlp, f"{path}.mlp.output" if mlp else None, item=0, n_items=2
    )
