"""The price on activity that the embedded models are trained with, against plain loops."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from circuitkit.models.zoo.training import PLACES, Activity, Prices

FAMILY = [5, 6, 7]
IDS = torch.tensor([[1, 5, 2, 6, 3, 7], [2, 6, 3, 5, 1, 5], [1, 2, 3, 1, 2, 5]])  # the last row has one member only
WEIGHTS = torch.ones(3, 6)
WEIGHTS[1, 0] = 0.0


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def cost(model, prices):
    activity = Activity(model, [FAMILY], prices, members=3)
    model(input_ids=IDS)
    found = activity.cost(IDS, WEIGHTS)
    activity.close()
    return found


def prices(places, mlps=(0, 0), relative=False):
    return Prices(dict(places.items()), mlps, relative)


def spread(rows):
    """The root mean square distance of vectors from their mean."""
    mean = sum(rows) / len(rows)
    return (sum(((row - mean) ** 2).sum() for row in rows) / len(rows)).sqrt()


def written(model, place, layer, head):
    """What a head adds to the stream at the tokens of a place, one vector per token."""
    read, stream = {}, {}
    block = model.transformer.h[layer]
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda module, args: read.update(z=args[0])),
        block.ln_2.register_forward_pre_hook(lambda module, args: stream.update(at=args[0])),
        block.mlp.register_forward_hook(lambda module, args, output: read.update(mlp=output)),
    ]
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    weight = block.attn.c_proj.weight[4 * head : 4 * head + 4]
    tokens = [(row, at) for row in (0, 1) for at in range(6) if WEIGHTS[row, at] > 0]
    scale = (sum((stream["at"][token] ** 2).sum() for token in tokens) / len(tokens)).sqrt()
    return (
        [read["z"][token][4 * head : 4 * head + 4] @ weight for token in tokens if place(*token)],
        scale,
        [read["mlp"][t] for t in tokens],
    )


AT = {
    "any": lambda row, at: True,
    "member": lambda row, at: IDS[row, at].item() in FAMILY,
    "before": lambda row, at: at < 5 and IDS[row, at + 1].item() in FAMILY and IDS[row, at].item() not in FAMILY,
    "other": lambda row, at: (at == 5 or IDS[row, at + 1].item() not in FAMILY) and IDS[row, at].item() not in FAMILY,
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("place", ["any", "member", "before"])
def test_the_cost_of_heads_is_that_of_plain_loops(model, place, relative):
    table = [[1.0, 3.0], [0.5, 2.0]]
    expected = 0.0
    for layer in (0, 1):
        for head in (0, 1):
            rows, scale, _ = written(model, AT[place], layer, head)
            expected += table[layer][head] * spread(rows) / (scale if relative else 1.0)
    expected *= 2 / 3  # two of three rows are of the family
    assert cost(model, prices({place: table}, relative=relative)).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("relative", [False, True])
def test_the_cost_of_mlps(model, relative):
    expected = 0.0
    for layer, price in ((0, 2.0), (1, 5.0)):
        _, scale, outputs = written(model, AT["any"], layer, 0)
        expected += price * spread(outputs) / (scale if relative else 1.0)
    found = cost(model, prices({}, mlps=(2.0, 5.0), relative=relative))
    assert found.item() == pytest.approx(expected.item() * 2 / 3, rel=1e-3)


def test_places_part_the_tokens():
    member = torch.isin(IDS, torch.tensor(FAMILY))
    parts = [PLACES[name](member) for name in ("member", "before", "other")]
    assert (sum(part.int() for part in parts) == 1).all(), "each token is at one place"
    assert parts[1].tolist() == [[bool(AT["before"](row, at)) for at in range(6)] for row in range(3)]
    assert parts[2].tolist() == [[bool(AT["other"](row, at)) for at in range(6)] for row in range(3)]
    assert PLACES["any"](member).all()


def test_a_head_that_writes_the_same_everywhere_costs_nothing(model):
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[:4] = 0.0
    assert (
        cost(model, prices({"any": [[1.0, 0.0], [0.0, 0.0]]})).item() < 2e-3 < cost(model, prices({"any": [[0.0, 1.0], [0.0, 0.0]]})).item()
    )


def test_no_hook_stays(model):
    cost(model, prices({"any": [[1.0, 1.0], [1.0, 1.0]]}))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
