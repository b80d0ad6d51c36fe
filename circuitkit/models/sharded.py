"""A model whose weights lie over several processes of one launch (tensor parallel), for those that fit no single card.

Every matrix of a layer is split by the columns that it writes: each process computes its share of them and all gather the rest. So what
enters and leaves every module is whole in every process, for all heads and neurons, and nothing else in the package sees a difference; no
sum is split, as it would be by rows. Every process makes the same search.
"""

from __future__ import annotations

import logging
from typing import Any

from nnsight.intervention.source import BODY_FORWARD
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from circuitkit.core.errors import ModelError, unknown_choice
from circuitkit.models.processes import processes

_log = logging.getLogger(__name__)

PLANS = ("auto",)
_BY_COLUMNS = "colwise_gather_output"
_WHOLE = "replicate"


def options_of(plan: str, shape: PreTrainedModel) -> dict[str, Any]:
    """The arguments with which transformers loads a model over the processes of this launch.

    Args:
        plan: One of ``PLANS``.
        shape: The model without weights.

    Raises:
        ModelError: The plan is unknown, a single process was launched, or the model has nothing that can be split.
    """
    if plan not in PLANS:
        raise ModelError(unknown_choice("tp_plan", plan, PLANS))
    count = processes().count
    if count < 2:
        raise ModelError(
            f"model.tp_plan={plan} lays one model over several processes, and there is one. Start them with `torchrun --nproc-per-node N`, "
            "or leave it out."
        )
    rules = rules_of(shape)
    if _BY_COLUMNS not in rules.values():
        raise ModelError(f"model.tp_plan={plan} splits linear maps, and {type(shape).__name__} has none in its layers. Leave it out.")
    split = sum(weight.numel() for name, weight in shape.named_parameters() if rules.get(_pattern(name.rpartition(".")[0])) == _BY_COLUMNS)
    share = split / sum(weight.numel() for weight in shape.parameters())
    _log.info("%d processes hold one model: %.0f %% of its weights are split by columns.", count, 100 * share)
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise ModelError("model.tp_plan needs a newer transformers, with transformers.distributed. Update it.") from error
    return {"distributed_config": DistributedConfig(tp_size=count, tp_plan=rules)}


def rules_of(shape: PreTrainedModel) -> dict[str, str]:
    """What is split how, by pattern: linear maps by columns; of the family's own plan only experts are left.

    The unembedding stays whole, as the embedding does, because passes read a few of its rows.
    """
    unembed = shape.get_output_embeddings()
    own = {name: style if "experts" in name else _WHOLE for name, style in (getattr(shape, "tp_plan", None) or {}).items()}
    linear = {_pattern(path) for path, module in shape.named_modules() if type(module) is nn.Linear and module is not unembed}
    return {**own, **{path: _BY_COLUMNS for path in linear if "experts" not in path}}


def is_sharded(module: nn.Module) -> bool:
    """Whether a process holds only a share of a module's weights."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A weight with the shares of all processes, which must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def settle(hf: PreTrainedModel) -> None:
    """Makes a model that lies over processes look whole from outside: to nnsight, and in its configuration.

    transformers gathers in a forward of its own around that of a module. nnsight would look between the two, at this process's share, and
    is told to take both for one. What says over how many processes the model lies is forgotten, since no result depends on it.
    """
    for module in hf.modules():
        if "forward" in vars(module):
            vars(module)[BODY_FORWARD] = True
    vars(hf.config).pop("distributed_config", None)


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))

