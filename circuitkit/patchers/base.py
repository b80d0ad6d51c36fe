"""What a removed component is replaced by."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from circuitkit.core.errors import MeasurementError, noting
from circuitkit.core.node import Node
from circuitkit.core.part import Part
from circuitkit.core.prompts import PromptSet
from circuitkit.core.shapes import Acts


@dataclass(frozen=True)
class Needs:
    """What a patcher must be given besides the current activation.

    Attributes:
        source: ``none``; ``run`` for the corrupt run's activation of the same prompt; ``mean`` for the mean over the corrupt prompts,
            position by position.
        pool: ``group`` to average within each template, ``all`` to average over all prompts. Only for ``mean``.
        conditional: MLP means are taken on the corrupt prompts with the heads that are currently out already replaced.
    """

    source: Literal["none", "run", "mean"] = "none"
    pool: Literal["group", "all"] = "all"
    conditional: bool = False


class Patcher(Part):
    """Says what the output of a removed component is replaced by. Pure: same inputs, same value.

    A patcher of your own sets ``needs`` and implements ``patch``:

        class Half(Patcher):
            needs = Needs()
            def patch(self, act, source, site):
                return act / 2

    Attributes:
        needs: What the engine has to prepare.
        reads_activation: Whether the value depends on the current activation. False lets the engine skip computing components that
            are replaced in every row, and then ``act`` carries only shape, dtype and device. The default is the safe one.
        gives_source: Whether the value is the source itself. True lets the engine leave out first positions in which clean and corrupt
            prompts are the same.
    """

    needs: Needs = Needs()
    reads_activation: bool = True
    gives_source: bool = False

    def check(self, prompts: PromptSet) -> None:
        """Refuses prompts for which the source is not defined: means by position over prompts of different lengths.

        Raises:
            MeasurementError: Prompts that a mean is taken over differ in length.
        """
        if self.needs.source != "mean" or not prompts.is_padded:
            return
        by_group = self.needs.pool == "group"
        for group in prompts.groups.unique().tolist() if by_group else [None]:
            lengths = prompts.lengths if group is None else prompts.lengths[prompts.groups == group]
            if lengths.min() < lengths.max():
                where = "all prompts" if group is None else f"the prompts of group {prompts.group_names[group]!r}"
                raise MeasurementError(
                    f"{type(self).__name__} averages over {where} position by position, which needs prompts of the same number of tokens, "
                    f"and these have {int(lengths.min())} to {int(lengths.max())}. Use patcher.pool=group with prompts of one length in "
                    "each group, prompts of one length, patcher=resample or patcher=zero."
                )

    @abstractmethod
    def patch(self, act: Acts, source: Acts | None, site: Node) -> Acts:
        """The replacement for one component's output.

        Args:
            act: What the component computes now. Not to be changed in place. How many rows come at a time is the engine's affair: make
                the value of a row from that row and its source alone.
            source: What ``needs`` asked for, in the same shape; None if it asked for nothing.
            site: The component, for patchers that treat components differently. Neurons and features of a place come all at once, one
                number per row (d = 1), and ``site.index`` is None.

        Returns:
            A tensor of the shape, dtype and device of ``act``.
        """

    def value(self, act: Acts, source: Acts | None, site: Node) -> Acts:
        """What ``patch`` gives, looked at; engines call this, authors write ``patch``. Arguments as there.

        Raises:
            MeasurementError: It gives no tensor like ``act``.
        """
        name = type(self).__name__
        with noting(lambda: f"{name}.patch failed at {site} (site {site.site}, layer {site.layer}), act {tuple(act.shape)}"):
            found = self.patch(act, source, site)
        if found.shape != act.shape or found.dtype != act.dtype or found.device != act.device:
            raise MeasurementError(
                f"{name}.patch gave a tensor {tuple(found.shape)} of {found.dtype} on {found.device} for {site}. Expected "
                f"one like the activation, {tuple(act.shape)} of {act.dtype} on {act.device}: make it with torch.zeros_like(act) or "
                "`.to(act)`."
            )
        return found
