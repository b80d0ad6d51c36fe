"""One search over several processes: each scores its share of the masks on a model of its own.

Only the first process searches. The others serve: they wait to be told of masks, score their share of them, and put their numbers
together with those of all others. So nothing has to happen alike in all of them, be it free memory, a journal or an interruption, and
decisions are those of one process. What passes between them are small tensors in main memory, without pickle.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from circuitkit.core.circuit import Circuit
from circuitkit.core.describe import identity
from circuitkit.core.errors import FailedElsewhere, MeasurementError
from circuitkit.core.node import Unit
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import CleanLogits, Masks, Values
from circuitkit.engine.base import WHOLE, Baseline, Engine, Share
from circuitkit.engine.dense.gradients import Gradients
from circuitkit.engine.edges.base import EdgeEngine
from circuitkit.models.processes import Processes, processes

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_SCORE, _ALONE, _END, _FAILED = 1, 2, 3, 4
_OTHER, _SAME, _GONE = 0, 1, 2
_NONE_LEFT = bytes(32)
# The first process may be busy alone for long, with its self-check for one; one that dies is noticed at once all the same.
_PATIENCE = timedelta(days=30)


def spread(
    engine: Engine, conduct: Callable[[Engine], _Result], encode: Callable[[_Result], str], decode: Callable[[str], _Result]
) -> _Result:
    """Does something with an engine; in a launch of several processes in the first one, with an engine whose work all of them share.

    Args:
        engine: Of this process; the same in all.
        conduct: What to do. An error in it ends the launch's work in all processes.
        encode: Its result as a text, for the other processes.
        decode: The result that such a text stands for.

    Returns:
        The same result in all processes.

    Raises:
        FailedElsewhere: Another process stopped; its own message says why.
    """
    launched = processes()
    if launched.count == 1 or engine.model.is_shared:  # one model over all processes: each makes the whole search
        return conduct(engine)
    joined = DistributedEngine(engine, launched)
    if not launched.is_first:
        return decode(joined.serve())
    try:
        result = conduct(joined)
        joined.finish(encode(result))
    finally:
        joined.stop()
    return result


@contextmanager
def shared(engine: Engine) -> Iterator[Engine | None]:
    """An engine whose work all processes of a launch share, or itself; None in a process that has served the first one until its end."""
    launched = processes()
    if launched.count == 1 or engine.model.is_shared:
        yield engine
        return
    joined = DistributedEngine(engine, launched)
    if not launched.is_first:
        joined.serve()
        yield None
        return
    try:
        yield joined
        joined.finish("done")
    finally:
        joined.stop()


class DistributedEngine(Engine):
    """Scores masks with all processes of a launch. Final.

    Args:
        engine: Of this process; the same in all. Over any universe.
        launched: Which process this is.

    Raises:
        MeasurementError: Another process works on something else.
    """

    unhashed = (*Engine.unhashed, "engine", "launched")

    def __init__(self, engine: Engine, launched: Processes) -> None:
        super().__init__(engine.model, engine.prompts, engine.patcher, engine.metric, engine.universe)
        self._engine = engine
        self._launched = launched
        self._serving = True
        self._trouble: Exception | None = None
        self._meet()

    @property
    def local(self) -> Engine:
        return self._engine

    @property
    def oracle(self) -> Engine:
        return self._engine.oracle

    @property
    def batch(self) -> int:
        return self._launched.count * self._engine.batch

    @property
    def margin(self) -> float:
        return self._engine.margin

    def clean_logits(self) -> CleanLogits:
        return self._engine.clean_logits()

    def baseline(self) -> Baseline:
        return self._engine.baseline()

    def gradients(self) -> Gradients:
        return self._engine.gradients()

    def check(self) -> None:
        self._engine.check()

    def prepare(self) -> None:
        self._engine.prepare()

    def on(self, prompts: PromptSet) -> Engine:
        return self._engine.on(prompts)

    def edges(self, circuit: Circuit | None = None, **options: Any) -> EdgeEngine:
        """Edges of this process alone: make them before the work is spread, and spread those."""
        return self._engine.edges(circuit, **options)

    def score(self, masks: Masks, base: Bool[Tensor, " unit"] | None = None) -> Values:
        masks = self.checked(masks, base)
        if len(masks) == 1:
            return self._engine.score(masks, base)
        table = masks if base is None else torch.cat([masks, base[None]])
        self._serving = False  # until the numbers are there, nobody listens for the end
        _tell(torch.tensor([_SCORE, len(table), int(base is not None)]))
        _tell(table.to(torch.uint8))
        values = self._scored(masks, base)
        self._serving = True
        return values

    def alone(self, units: Sequence[Unit | str], share: Share = WHOLE) -> Float[Tensor, "unit prompt"]:
        places = self.universe.places(units)
        if not len(places) or share != WHOLE:
            return self._engine.alone(units, share)
        self._serving = False
        _tell(torch.tensor([_ALONE, len(places), 0]))
        values = self._alone(_tell(places))
        self._serving = True
        return values

    def serve(self) -> str:
        """Scores what the first process asks for, until it is done.

        Returns:
            What it says at the end.

        Raises:
            FailedElsewhere: The first process stopped before.
            MeasurementError: Another process failed.
        """
        try:
            self._engine.check()  # the first process does so too, at this time
        except Exception as error:  # to be told with the first share that is asked for
            self._trouble = error
        while True:
            kind, size, has_base = _tell(torch.zeros(3, dtype=torch.long)).tolist()
            if kind == _FAILED:
                raise FailedElsewhere("The first process of this launch stopped before the end; its own message says why.")
            if kind == _END:
                return bytes(_tell(torch.zeros(size, dtype=torch.uint8)).tolist()).decode()
            if kind == _ALONE:
                self._alone(_tell(torch.zeros(size, dtype=torch.long)))
                continue
            table = _tell(torch.zeros(size, len(self.universe), dtype=torch.uint8)).bool()
            self._scored(table[: size - has_base], table[-1] if has_base else None)

    def finish(self, text: str) -> None:
        """Lets the other processes go, with what ``serve`` is to return there. Only the first process calls it."""
        body = text.encode()
        self._serving = False
        _tell(torch.tensor([_END, len(body), 0]))
        _tell(torch.frombuffer(bytearray(body), dtype=torch.uint8))

    def stop(self) -> None:
        """Lets the other processes go with an error, unless they have gone. Only the first process calls it."""
        if self._serving:
            self._serving = False
            _tell(torch.tensor([_FAILED, 0, 0]))

    def _scored(self, masks: Masks, base: Bool[Tensor, " unit"] | None) -> Values:
        """The numbers of all masks: every process scores each n-th of them."""
        index, count = self._launched.index, self._launched.count
        mine, size = masks[index::count], -(-len(masks) // count)
        values = torch.empty(len(masks), len(self.prompts))
        for place, each in enumerate(self._together(lambda: self._engine.score(mine, base) if len(mine) else torch.empty(0), size)):
            share = values[place::count]
            share.copy_(each[: len(share)])
        return values

    def _alone(self, places: Tensor) -> Values:
        """The numbers of single units: every process makes each n-th of the passes that one process alone would make, so that they are the
        same to the last bit."""
        units = [self.universe.unit(place) for place in places.tolist()]
        share = Share(self._launched.index, self._launched.count)
        tables = torch.stack(self._together(lambda: self._engine.alone(units, share), len(units)))
        if ((~tables.isnan()).sum(0) == 1).all():
            return tables.nansum(0)
        # Memory ran out in one of them, so that its passes were others: each makes all of them then, and the first one's numbers count.
        return self._together(lambda: self._engine.alone(units), len(units))[0]

    def _together(self, work: Callable[[], Values], n_rows: int) -> list[Values]:
        """What each process computes of its share, padded to so many rows. An error anywhere becomes one everywhere."""
        table = torch.zeros(n_rows, len(self.prompts) + 1)
        error = self._trouble
        try:
            if error is None:
                found = work()
                table[: len(found), :-1] = found
        except Exception as caught:  # told to the others first, or they would wait for ever
            error = caught
        table[:, -1] = float(error is not None)
        tables = _gathered(table, self._launched.count)
        failed = [str(place) for place, each in enumerate(tables) if each[0, -1]]
        if error is not None or failed:
            self._serving = False  # all of them raise now
            raise error or MeasurementError(f"Process {', '.join(failed)} of this launch failed; its own message says why.")
        return [each[:, :-1] for each in tables]

    def _meet(self) -> None:
        """Waits for the other processes. In a sweep one may have failed a job that the others go on with."""
        parts = identity({"patcher": self.patcher, "metric": self.metric, "engine": self._engine})
        work = (self.model.name, self.universe.digest(), self.prompts.content_hash(), parts.settings, parts.code)
        _meet(hashlib.sha256(repr(work).encode()).digest(), self._launched)
        _log.info("%d processes share the masks of this search.", self._launched.count)


def _tell(tensor: Tensor) -> Tensor:
    """What the first process holds, in all processes."""
    distributed.broadcast(tensor, src=0, group=_group())
    return tensor


def _gathered(tensor: Tensor, count: int) -> list[Tensor]:
    """What each process holds, in all processes."""
    tensors = [torch.empty_like(tensor) for _ in range(count)]
    distributed.all_gather(tensors, tensor, group=_group())
    return tensors


def _meet(work: bytes, launched: Processes) -> None:
    """Waits until all processes are here with the same work, or with none left.

    Raises:
        MeasurementError: The first process has other work, or another process has none left.
    """
    own, leaves = torch.tensor(list(work), dtype=torch.uint8), work == _NONE_LEFT
    while True:
        same = torch.equal(_tell(own.clone()), own)
        answers = [int(answer) for answer in _gathered(torch.tensor([_SAME if same else _GONE if leaves else _OTHER]), launched.count)]
        if set(answers) == {_SAME}:
            return
        if launched.is_first and not leaves and _GONE in answers:
            raise MeasurementError(f"Process {answers.index(_GONE)} of this launch has ended; its own message says why.")
        if not launched.is_first and not leaves and not same:
            raise MeasurementError(
                "This process does not have the model, prompts, patcher and metric of the first process of its launch, or that one has "
                "left this job out. Start all of them with the same settings, on the same kind of device."
            )


@cache
def _group() -> distributed.ProcessGroup:
    """Over gloo also where the launch talks over NCCL, because small tensors in main memory are sent."""
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, distributed.ProcessGroup)
    atexit.register(_part)
    return group


def _part() -> None:
    """Ends together: a launcher ends all processes when the first of them ends with an error, which may still be writing its files."""
    with suppress(RuntimeError):  # another one broke off
        _meet(_NONE_LEFT, processes())
