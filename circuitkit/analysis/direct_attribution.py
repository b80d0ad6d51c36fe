"""Direct logit attribution: how much each part adds to the logit of the answer less that of the wrong answer, straight through the
residual stream.

The residual stream at the last position is a sum, so behind the final norm, divided by the scale that this prompt really has there, the
difference of two logits is a sum too: that of the embedding, every head, every MLP, and the biases that no part owns (those of the output
projections, the norms and the unembedding). What a part does through later parts is not in its number.

Where a norm lies behind attention or MLP (post-norm), its scale too is held at what this prompt really has there, as that of the final
norm: then heads share in what it makes of their sum. What a head does to that scale is in nobody's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitkit.core.errors import MeasurementError, ModelError
from circuitkit.core.prompts import PromptSet
from circuitkit.core.universe import Universe
from circuitkit.engine.packed.memory import RowBudget
from circuitkit.models.blocks import Part, norm_behind
from circuitkit.models.checks import tolerance
from circuitkit.models.hooked import HookedModel, Layer
from circuitkit.models.linear import check_sums
from circuitkit.models.norms import HeldNorm

BIAS = "bias"


@dataclass(frozen=True)
class Attribution:
    """Shares of the logit difference, in logits. They sum to it.

    Attributes:
        parts: ``input``, the heads and MLPs in causal order, and ``bias``.
        values: The share of each part, for each prompt.
        differences: The model's own logit differences.
    """

    parts: tuple[str, ...]
    values: Float[Tensor, "prompt part"]
    differences: Float[Tensor, " prompt"]

    @cached_property
    def means(self) -> dict[str, float]:
        """The mean share of each part over the prompts."""
        return dict(zip(self.parts, self.values.mean(0).tolist(), strict=True))

    def top(self, n: int) -> list[tuple[str, float]]:
        """The n parts with the largest mean shares, in either direction."""
        return sorted(self.means.items(), key=lambda item: -abs(item[1]))[:n]


def direct_attribution(model: HookedModel, prompts: PromptSet) -> Attribution:
    """Shares of answer minus wrong answer at the last position of the clean prompts.

    Args:
        model: A model whose logits are linear in the residual stream behind the final norm.
        prompts: Their answers and wrong answers.

    Raises:
        ModelError: The model is not of that form; the text says why.
        MeasurementError: The shares do not sum to the model's own logit difference.
    """
    check_linear(model)
    prompts.require_last("Direct logit attribution")
    states = _read(model, prompts)
    direction, biases = _readout(model, states.resid, prompts)
    columns = [(states.embedded * direction).sum(-1, keepdim=True)]
    for layer in range(model.n_layers):
        write, bias = _head_writes(model, layer)
        z, mlp_out = states.z[layer].double(), states.mlp_out[layer].double()
        read, offset = _behind(model, layer, "attention", direction, z.flatten(-2) @ write + bias)
        columns.append((z * (read @ write.T).unflatten(-1, (model.n_heads, -1))).sum(-1))
        biases = biases + read @ bias + offset
        read, offset = _behind(model, layer, "mlp", direction, mlp_out)
        columns.append((mlp_out * read).sum(-1, keepdim=True))
        biases = biases + offset
    values = torch.cat([*columns, biases[:, None]], 1)
    parts = ("input", *(str(node) for node in Universe.of_nodes(model.n_layers, model.n_heads)), BIAS)
    found = Attribution(parts, values, states.differences)
    _check_sum(model, found, states.spread)
    return found


def check_linear(model: HookedModel) -> None:
    """Refuses a model whose logits are no sum of its parts' shares.

    Raises:
        ModelError: It is none; the text says why.
    """
    check_sums(model, "Shares in the logits")
    remedy = "Use a model of another family, or measure the parts by removing them (method=knockout)."
    if not model.map.additive or not model.map.direct or len(model.universe) != model.n_layers * (model.n_heads + 1):
        why = (
            "each sum passes through a norm before the next part is added to it" if not model.map.additive
            else "something lies between the final norm and the unembedding" if not model.map.direct
            else "some layers have no attention heads or no MLP"
        )  # fmt: skip
        raise ModelError(f"In {model.name} ({model.map.family}) {why}, so shares in the logits are not defined. {remedy}")
    if any(addend.scale != 1 for block in model.map.blocks for addend in block.addends):
        raise ModelError(f"{model.name} ({model.map.family}) multiplies what its parts add, which shares do not count in. {remedy}")
    if model.settings.get("final_logit_softcapping"):
        raise ModelError(f"{model.name} caps its logits with a curve (final_logit_softcapping), so they are no sum of shares. {remedy}")
    norm: Any = model.final_norm
    if not (isinstance(norm, nn.LayerNorm) or type(norm).__name__.endswith("RMSNorm")):
        raise ModelError(f"The final norm of {model.name} is a {type(norm).__name__}; expected a LayerNorm or an RMSNorm. {remedy}")
    if any(weight.device.type == "meta" for weight in (norm.weight, model.unembedding.weight)):
        raise ModelError(
            f"The final norm or unembedding of {model.name} is offloaded, so its weights cannot be read. Load the model without offloading "
            "(model.device_map=null), or onto more devices."
        )


def _check_sum(model: HookedModel, found: Attribution, spread: float) -> None:
    error, allowed = (found.values.sum(-1) - found.differences).abs().max().item(), tolerance(model) * spread
    if not error <= allowed:
        raise MeasurementError(
            f"The shares of the logit difference do not sum to it: they are off by up to {error:.3g} logits, and {allowed:.3g} is allowed "
            f"in {str(model.dtype).removeprefix('torch.')}. Load the model in float32 (model.dtype=float32); if that does not help, it is "
            "not built as the map of its parts says, which `circuitkit job=doctor` will show."
        )


class _States(NamedTuple):
    """What the model computes at the last position: inside the stream, and of the logits. ``spread`` is their standard deviation."""

    embedded: Float[Tensor, "prompt d_model"]
    z: Float[Tensor, "layer prompt head d_head"]
    mlp_out: Float[Tensor, "layer prompt d_model"]
    resid: Float[Tensor, "prompt d_model"]
    differences: Float[Tensor, " prompt"]
    spread: float


def _read(model: HookedModel, prompts: PromptSet) -> _States:
    rows = RowBudget(model, prompts.n_pos).rows
    parts = [_read_slice(model, prompts.take(part)) for part in torch.arange(len(prompts)).split(rows)]
    embedded, z, mlp_out, resid, differences, spread = zip(*parts, strict=True)
    return _States(torch.cat(embedded), torch.cat(z, 1), torch.cat(mlp_out, 1), torch.cat(resid), torch.cat(differences), max(spread))


def _read_slice(model: HookedModel, prompts: PromptSet) -> _States:
    entered: list[Tensor] = []
    z: list[Tensor] = []
    mlp_out: list[Tensor] = []
    left: list[Tensor] = []

    def last(value: Tensor) -> Tensor:
        return value[:, -1].cpu()

    def visit(layer: Layer) -> None:
        resid = layer.resid
        if layer.index == 0:
            entered.append(last(resid))
        z.append(last(layer.z))
        mlp_out.append(last(layer.mlp_out))
        if layer.index == model.n_layers - 1:
            left.append(last(layer.out))

    logits = model.run(prompts.clean, visit, **prompts.padding(slice(0, len(prompts))))
    assert logits is not None
    logits = last(logits).double()
    rows = torch.arange(len(prompts))
    differences = logits[rows, prompts.answers.tokens] - logits[rows, prompts.wrongs.tokens]
    return _States(entered[0], torch.stack(z), torch.stack(mlp_out), left[0], differences, logits.std().item())


def _readout(
    model: HookedModel, resid: Float[Tensor, "prompt d_model"], prompts: PromptSet
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
    """What each dimension of the stream adds to answer minus wrong answer, the scale of the norm held; and what the biases add."""
    norm: Any = model.final_norm
    head: Any = model.unembedding
    answers, wrongs = (column.to(head.weight.device) for column in (prompts.answers.tokens, prompts.wrongs.tokens))

    def between(table: Tensor) -> Tensor:
        return table.detach()[answers].cpu().double() - table.detach()[wrongs].cpu().double()

    read = between(head.weight)
    biases = torch.zeros(len(prompts), dtype=torch.double)
    if getattr(head, "bias", None) is not None:
        biases += between(head.bias)
    held = _held(norm, resid, norm.weight.device)
    return held.back(read), biases + read @ held.offset


def _held(norm: nn.Module, read: Float[Tensor, "prompt d_model"], device: torch.device) -> HeldNorm:
    """A norm with its scale held at what it is for what it reads, on the CPU and in float64."""
    held = HeldNorm.at(norm, read.to(device, torch.float32))
    return HeldNorm(held.scale.cpu().double(), held.offset.cpu().double(), held.is_centred)


def _behind(
    model: HookedModel, layer: int, part: Part, direction: Float[Tensor, "prompt d_model"], out: Float[Tensor, "prompt d_model"]
) -> tuple[Float[Tensor, "prompt d_model"], Float[Tensor, " prompt"]]:
    """Along what attention or MLP have to give for what is then added to the stream to lie along ``direction``, the scale of a norm between
    held at what it makes of ``out``; and what that norm's bias adds."""
    norm = norm_behind(model, layer, part)
    if norm is None:
        return direction, direction.new_zeros(len(direction))
    held = _held(norm, out, model.device_of(layer))
    return held.back(direction), direction @ held.offset


def _head_writes(model: HookedModel, layer: int) -> tuple[Float[Tensor, "z d_model"], Float[Tensor, " d_model"]]:
    """What each dimension of z gives, and the bias of the output projection: asked of the module, whatever its layout is."""
    width = model.n_heads * model.d_head
    unit = torch.eye(width, dtype=model.dtype, device=model.device_of(layer)).unflatten(-1, (model.n_heads, -1))
    bias = model.project(layer, torch.zeros_like(unit[:1]))[0].cpu().double()
    return model.project(layer, unit).cpu().double() - bias, bias
