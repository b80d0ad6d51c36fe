"""What every patcher must keep to."""

from __future__ import annotations

import torch
from torch import Tensor

from circuitkit.core.node import Node
from circuitkit.patchers.base import Patcher
from circuitkit.testing.base import PartConformance


class PatcherConformance(PartConformance):
    """What every patcher must keep to. ``make`` returns one."""

    def _patched(self, patcher: Patcher, act: Tensor, seed: int = 1, site: str = "a0.h0") -> Tensor:
        source = torch.randn(act.shape, generator=torch.Generator().manual_seed(seed)).to(act.dtype)
        return patcher.patch(act, None if patcher.needs.source == "none" else source, Node.parse(site))

    def _act(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def test_shape_dtype_and_device_are_kept(self) -> None:
        """For heads and MLPs, with and without leading axes for masks, in every floating dtype."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for shape in ((3, 4), (2, 3, 4), (5, 2, 3, 4)):
                for site in ("a0.h1", "m0"):
                    act = self._act(*shape, dtype=dtype)
                    out = self._patched(self.make(), act, site=site)
                    expected = (act.shape, act.dtype, act.device)
                    assert (out.shape, out.dtype, out.device) == expected, (
                        f"expected {expected}, found {(out.shape, out.dtype, out.device)}"
                    )

    def test_nothing_is_changed_in_place(self) -> None:
        """Activation and source are used again by others."""
        patcher, act = self.make(), self._act(2, 3, 4)
        source = self._act(2, 3, 4, seed=1)
        copies = act.clone(), source.clone()
        patcher.patch(act, None if patcher.needs.source == "none" else source, Node.of_mlp(0))
        assert torch.equal(act, copies[0]), "the activation was changed in place"
        assert torch.equal(source, copies[1]), "the source was changed in place"

    def test_it_is_deterministic(self) -> None:
        """The same inputs give the same value, from the same object and from a new one."""
        patcher, act = self.make(), self._act(2, 3, 4)
        first = self._patched(patcher, act)
        assert torch.equal(first, self._patched(patcher, act)), "a second call gave another value"
        assert torch.equal(first, self._patched(self.make(), act)), "an object made alike gave another value"

    def test_it_treats_rows_alike(self) -> None:
        """Rows may come in any packing: a row's value depends on that row."""
        patcher, act = self.make(), self._act(4, 3, 4)
        source = self._act(4, 3, 4, seed=1)
        given = None if patcher.needs.source == "none" else source
        whole = patcher.patch(act, given, Node.of_mlp(0))
        for row in range(4):
            one = patcher.patch(act[row : row + 1], None if given is None else given[row : row + 1], Node.of_mlp(0))
            torch.testing.assert_close(one, whole[row : row + 1], msg="a row alone gave another value than the row among others")

    def test_it_reads_the_activation_just_if_it_says_so(self) -> None:
        """``reads_activation = False`` lets the engine leave modules uncomputed, and then the activation it passes holds no values."""
        patcher = self.make()
        values = [self._patched(patcher, self._act(2, 3, 4, seed=seed)) for seed in (0, 7)]
        nan = self._patched(patcher, torch.full((2, 3, 4), torch.nan))
        if not patcher.reads_activation:
            assert torch.equal(*values) and torch.equal(values[0], nan), "it reads the activation: set reads_activation = True"

    def test_it_gives_back_its_source_if_it_says_so(self) -> None:
        """``gives_source = True`` lets the engine leave positions uncomputed where clean and corrupt prompts are the same."""
        patcher, source = self.make(), self._act(2, 3, 4, seed=1)
        if patcher.gives_source and patcher.needs.source != "none":
            value = patcher.patch(self._act(2, 3, 4), source, Node.of_mlp(0))
            assert torch.equal(value, source), "it gives something else than its source: set gives_source = False"

    def test_gradients_pass(self) -> None:
        """Through the activation if it is read, through the source if there is one."""
        patcher = self.make()
        act, source = self._act(2, 3, 4).requires_grad_(True), self._act(2, 3, 4, seed=1).requires_grad_(True)
        has_source = patcher.needs.source != "none"
        out = patcher.patch(act, source if has_source else None, Node.of_mlp(0))
        if patcher.reads_activation:
            assert out.requires_grad, "no gradient flows, although the activation is read"
            assert torch.autograd.grad(out.sum(), act, allow_unused=True, retain_graph=True)[0] is not None, (
                "no gradient reaches the activation"
            )
