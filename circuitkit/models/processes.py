"""The processes of one launch: how many ``accelerate launch`` or ``torchrun`` started, and which one this is."""

from __future__ import annotations

import atexit
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import distributed

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch.

    Attributes:
        index: Which one, from 0. The first conducts, logs and writes; the others work for it.
        count: How many there are.
        device: The card that this one should use; None where there is only one process, or no card.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that conducts, logs and writes."""
        return self.index == 0


def least(value: int) -> int:
    """The smallest number that any process of the launch gives; all must ask together."""
    given = torch.tensor([value], dtype=torch.long)
    distributed.all_reduce(given, distributed.ReduceOp.MIN, group=_small())
    return int(given)


@cache
def _small() -> Any:
    """Over gloo also where the launch talks over NCCL, because it is for numbers in main memory."""
    return distributed.new_group(backend="gloo")


def processes() -> Processes:
    """This process among those of its launch, after joining them; a single one where nothing was launched."""
    joined = distributed.is_available() and distributed.is_initialized()
    if not joined and int(os.environ.get("WORLD_SIZE") or 1) < 2:
        _warn_of_a_launch_of_one()
        return Processes()
    return _joined()


@cache
def _warn_of_a_launch_of_one() -> None:
    # What it leaves in the environment where more than one process was asked for: without MPI it starts one and does not say so.
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        _log.warning(
            "`accelerate launch --cpu` started a single process: it needs MPI for several. Take `accelerate launch --multi_gpu`, which "
            "works without cards too, or `torchrun --nproc-per-node N`."
        )


@cache
def _joined() -> Processes:
    from accelerate import PartialState  # slow to import, and only launches need it

    has_cards = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    owned = not distributed.is_initialized()
    state = PartialState(cpu=not has_cards)
    if owned:
        atexit.register(_leave)
    return Processes(state.process_index, state.num_processes, state.device if has_cards else None)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
