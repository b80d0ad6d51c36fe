"""Generation with components removed: against a loop with plain torch hooks, with and without a cache, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import FAMILIES, PATCHERS, VOCAB, random_masks, same_state, shared_model, state_of, tiny_model, tiny_prompts

from circuitkit.core.errors import MeasurementError
from circuitkit.core.node import Kind
from circuitkit.evaluation.generation import generate
from circuitkit.models.hooked import HookedModel
from circuitkit.patchers import Mean, Resample, Zero

NEW = 5
PLAIN = ("zero", "resample", "mean_all", "mean_group", "halfway", "flipped")


def by_hand(model, prompts, mask, patcher, new=NEW):
    """One mask and one prompt at a time, no cache, plain hooks: returns tokens a prompt and the smallest lead of a chosen token."""
    removed = [node for node, kept in zip(model.universe.nodes, mask.tolist(), strict=True) if not kept]
    corrupt = {node: act for node, act in recorded(model, prompts.corrupt).items() if node in removed}
    rows, lead = [], float("inf")
    for row in range(len(prompts)):
        seen = prompts.clean[row].tolist()
        sources = {node: source_for(act, patcher, prompts.groups, row) for node, act in corrupt.items()}
        for _ in range(new):
            logits = run(model, torch.tensor([seen]), {node: (patcher, source) for node, source in sources.items()})[0, -1]
            best = logits.topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item())
            seen.append(best.indices[0].item())
            if seen[-1] == 0:
                break
        rows.append([token for token in seen[prompts.n_pos :] if token != 0])
    return rows, lead


def source_for(act, patcher, groups, row):
    if patcher.needs.source == "none":
        return None
    if patcher.needs.source == "run":
        return act[row]
    return act[groups == groups[row]].mean(0) if patcher.needs.pool == "group" else act.mean(0)


def split(model, node, act):
    return act.unflatten(-1, (model.n_heads, -1))[..., node.head, :] if node.kind is Kind.HEAD else act


def recorded(model, ids):
    found, handles = {}, []

    def keep(node):
        def hook(module, args, out=None):
            found[node] = split(model, node, args[0] if out is None else out)

        return hook

    for node in model.universe.nodes:
        if node.kind is Kind.HEAD:
            handles.append(model.module(node.layer, "out_proj").register_forward_pre_hook(keep(node)))
        else:
            handles.append(model.module(node.layer, "mlp").register_forward_hook(keep(node)))
    with torch.no_grad():
        model.hf(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def run(model, ids, edits):
    handles = []

    def value(node, act, patcher, source):
        if source is not None:  # behind the prompt, the value of its last position
            source = torch.cat([source, source[-1:].expand(ids.shape[1] - len(source), -1)])[None]
        return patcher.patch(act, source, node)

    def replace_head(node, patcher, source):
        def hook(module, args):
            z = args[0].clone().unflatten(-1, (model.n_heads, -1))
            z[..., node.head, :] = value(node, split(model, node, args[0]), patcher, source)
            return (z.flatten(-2),)

        return hook

    def replace_mlp(node, patcher, source):
        return lambda module, args, out: value(node, out, patcher, source)

    for node, (patcher, source) in edits.items():
        if node.kind is Kind.HEAD:
            handles.append(model.module(node.layer, "out_proj").register_forward_pre_hook(replace_head(node, patcher, source)))
        else:
            handles.append(model.module(node.layer, "mlp").register_forward_hook(replace_mlp(node, patcher, source)))
    with torch.no_grad():
        logits = model.hf(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def lists(found):
    return [[[token for token in row if token >= 0] for row in mask] for mask in found.tokens.tolist()]


@pytest.mark.parametrize("patcher", PLAIN)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_by_hand_with_and_without_cache(family, patcher):
    """Every family, grouped key/value heads and Gemma's among them; masks of heads and MLPs."""
    model, patcher, prompts = shared_model(family), PATCHERS[patcher], tiny_prompts(4, 4, seed=3)
    masks = torch.cat([model.universe.full()[None], random_masks(2, len(model.universe), seed=len(family))])
    by_mask = [by_hand(model, prompts, mask, patcher) for mask in masks]
    assert min(lead for _, lead in by_mask) > 1e-4, "a tie, which rounding may turn: choose another seed"
    expected = [rows for rows, _ in by_mask]
    settings = {"max_new_tokens": NEW, "groups": prompts.groups}
    assert lists(generate(model, prompts.clean, masks, patcher, prompts.corrupt, **settings)) == expected
    assert lists(generate(model, prompts.clean, masks, patcher, prompts.corrupt, **settings, use_cache=False)) == expected
    assert len({str(rows) for rows in expected}) > 1, "the masks change nothing, so the test shows nothing"


def test_a_sliding_window_that_prompts_outgrow():
    model, prompts = tiny_model("mistral"), tiny_prompts(4, 6)
    model.hf.config.sliding_window = 4
    masks = random_masks(3, len(model.universe))
    found = [lists(generate(model, prompts.clean, masks, Zero(), max_new_tokens=NEW, use_cache=cache)) for cache in (True, False)]
    assert found[0] == found[1] == [by_hand(model, prompts, mask, Zero())[0] for mask in masks]
    model.hf.config.sliding_window = None
    assert found[0] != lists(generate(model, prompts.clean, masks, Zero(), max_new_tokens=NEW)), "or the window would not matter"


def test_as_transformers_generates():
    """Nothing removed: the greedy generation of transformers itself, end of text included."""
    model, prompts = shared_model("llama"), tiny_prompts(12, 4)
    found = generate(model, prompts.clean, model.universe.full()[None], Zero(), max_new_tokens=10)
    seen = torch.ones_like(prompts.clean)
    theirs = model.hf.generate(prompts.clean, attention_mask=seen, do_sample=False, max_new_tokens=10, pad_token_id=0)[:, 4:]
    assert torch.equal(found.tokens[0].clamp(min=0), torch.nn.functional.pad(theirs, (0, 10 - theirs.shape[1])))
    assert found.ended[0].tolist() == [0 in row for row in theirs.tolist()]
    assert found.ended.any() and not found.ended.all(), "this seed shows both"


@pytest.mark.parametrize("max_rows", [1, 5, None])
def test_rows_may_be_packed_in_any_way(max_rows):
    model, prompts = shared_model("qwen2"), tiny_prompts(4, 5)
    masks = random_masks(3, len(model.universe), seed=1)
    expected = lists(generate(model, prompts.clean, masks, Resample(), prompts.corrupt, max_new_tokens=3))
    assert lists(generate(model, prompts.clean, masks, Resample(), prompts.corrupt, max_new_tokens=3, max_rows=max_rows)) == expected


@pytest.mark.parametrize("patcher", [Zero(), Mean()])
def test_passes_that_do_not_fit_are_halved(patcher, monkeypatch):
    model, prompts = shared_model("gpt2"), tiny_prompts(6, 5)
    masks = random_masks(3, len(model.universe), seed=1)
    expected = lists(generate(model, prompts.clean, masks, patcher, prompts.corrupt, max_new_tokens=3))
    whole, sizes = HookedModel.run, []

    def fails_above_four(self, ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, ids, *args, **kwargs)

    monkeypatch.setattr(HookedModel, "run", fails_above_four)
    assert lists(generate(model, prompts.clean, masks, patcher, prompts.corrupt, max_new_tokens=3)) == expected
    assert max(sizes) > 4


def test_the_end_of_text_ends_a_row_and_all_of_them_a_pass(monkeypatch):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.hf.transformer.ln_f.weight.zero_()
        model.hf.transformer.ln_f.bias.copy_(model.hf.lm_head.weight[0] * 100)  # token 0, the end, is always the likeliest
    calls, whole = [], HookedModel.run
    monkeypatch.setattr(HookedModel, "run", lambda self, ids, *args, **kwargs: calls.append(1) or whole(self, ids, *args, **kwargs))
    found = generate(model, tiny_prompts(3, 4).clean, random_masks(2, len(model.universe)), Zero(), max_new_tokens=6)
    assert found.ended.all() and (found.tokens == -1).all() and len(calls) == 1
    assert found.text(0, 0, str, 6) == "[]"


def test_rows_that_have_ended_are_computed_no_further(monkeypatch):
    model, prompts = shared_model("llama"), tiny_prompts(12, 4)
    sizes, whole = [], HookedModel.run
    monkeypatch.setattr(HookedModel, "run", lambda self, ids, *args, **kwargs: sizes.append(len(ids)) or whole(self, ids, *args, **kwargs))
    found = generate(model, prompts.clean, random_masks(2, len(model.universe)), Zero(), max_new_tokens=10)
    assert sizes[0] == 24 and sizes[1:] == [int((found.tokens[..., new] >= 0).sum()) for new in range(9)]
    assert sizes[-1] < 24, "none ended, so the test shows nothing"


def test_the_model_is_left_as_it_was():
    model, prompts = tiny_model("llama"), tiny_prompts(3, 4)
    before = state_of(model)
    generate(model, prompts.clean, random_masks(2, len(model.universe)), Mean(), prompts.corrupt, max_new_tokens=3)
    assert same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("patcher", "corrupt", "new", "sentence"),
    [
        (Mean(), torch.zeros(2, 5, dtype=torch.long), 3, r"as many tokens as its clean one.*\(2, 5\) and \(2, 4\).*patcher=zero"),
        (Resample(), None, 3, "Resample takes its values from corrupt prompts, and there are none"),
        (Mean("conditional"), torch.zeros(2, 4, dtype=torch.long), 3, "Conditional means are not taken.*patcher.means=plain"),
        (Zero(), None, 0, "at most 13 tokens; found max_new_tokens=0"),
        (Zero(), None, 14, "at most 13 tokens; found max_new_tokens=14"),
    ],
)
def test_what_is_refused(patcher, corrupt, new, sentence):
    model = shared_model("gpt2")  # 16 positions
    ids = torch.randint(1, VOCAB, (2, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(MeasurementError, match=sentence):
        generate(model, ids, model.universe.empty()[None], patcher, corrupt, max_new_tokens=new)


def test_the_last_position_fits():
    model = shared_model("gpt2")
    ids = torch.ones(1, 4, dtype=torch.long)
    for cache in (True, False):
        assert generate(model, ids, model.universe.empty()[None], Zero(), max_new_tokens=13, use_cache=cache).tokens.shape == (1, 1, 13)
