"""The model as transformers made it: nnsight's forwards are put aside for a while.

nnsight puts a forward of its own into every module when it wraps a model, and leaves it there. Outside of a trace it hands on what it is
given; but what is to be compared with nnsight must not run through it. So the forwards are noted before the model is wrapped, and
``unwrapped`` puts them back. Accelerate also moves weights and inputs by a forward of its own, which nnsight replaces as well: that one is
an original, and comes back with the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import nnsight
from nnsight.intervention.source import Controller
from torch import nn

from circuitkit.core.errors import ModelError

_NOTE = "_circuitkit_forward"  # in the module itself, so that it lives and dies with it: most originals refer to their module


@dataclass
class _Aside:
    """nnsight's forwards while they are put aside, and how many contexts need that."""

    forwards: list[tuple[nn.Module, Controller]]
    contexts: int = 1


_aside: dict[nn.Module, _Aside] = {}
_changing = Lock()


def wrapped(hf: nn.Module) -> nnsight.NNsight:
    """nnsight's view of a model, whose forwards are noted before.

    Raises:
        ModelError: Somebody else wrapped the model, so that the original forwards are not known; or ``unwrapped`` is open.
    """
    if is_unwrapped(hf):
        raise ModelError("The model was to be wrapped while its own forwards are in place. Make the HookedModel outside of `unwrapped`.")
    for path, module in hf.named_modules():
        forward = vars(module).get("forward")
        if _NOTE not in vars(module) and isinstance(forward, Controller):
            raise ModelError(
                f"nnsight has wrapped the model before ({path or 'the model itself'}), so its own forwards are not known. Expected a model "
                "as transformers made it: load it anew and give it to HookedModel."
            )
        vars(module).setdefault(_NOTE, forward)
    return nnsight.NNsight(hf)


@contextmanager
def unwrapped(hf: nn.Module) -> Iterator[None]:
    """Within this context every module of a model has the forward that it had before nnsight; then nnsight's again, also after an error.

    It may be entered again inside, and by several threads: the last one out puts nnsight's forwards back. Forwards belong to the model and
    not to a thread, so no thread can trace the model meanwhile; ``HookedModel.run`` then refuses.

    Args:
        hf: A model that is wrapped; ``HookedModel.hf``. One that never was is left as it is.

    Raises:
        ModelError: A forward was replaced after the model had been wrapped, so that nnsight may be under it.
    """
    with _changing:
        if hf in _aside:
            _aside[hf].contexts += 1
        else:
            _aside[hf] = _Aside(_put_aside(hf))
    try:
        yield
    finally:
        with _changing:
            _aside[hf].contexts -= 1
            if not _aside[hf].contexts:
                for module, forward in _aside.pop(hf).forwards:
                    vars(module)["forward"] = forward


def is_unwrapped(hf: nn.Module) -> bool:
    """Whether the model's own forwards are in place of nnsight's."""
    return hf in _aside


def _put_aside(hf: nn.Module) -> list[tuple[nn.Module, Controller]]:
    """Puts the noted forwards in place of nnsight's; nothing is changed if that cannot be done everywhere."""
    forwards: list[tuple[nn.Module, Controller]] = []
    for path, module in hf.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Controller) != (_NOTE in vars(module)):
            raise ModelError(
                f"The forward of {path or 'the model itself'} was replaced or added after the model had been wrapped, so it cannot run "
                "without nnsight. Place, compile or change the model first, then give it to HookedModel."
            )
        if isinstance(forward, Controller):
            forwards.append((module, forward))
    for module, _ in forwards:
        _put(module, vars(module)[_NOTE])
    return forwards


def _put(module: nn.Module, forward: Any) -> None:
    """None is no forward of the module's own: that of its class counts."""
    if forward is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = forward
