"""Engines: masks in, scores out.

One value on its way from a setting to a tensor, ``patcher=mean`` (mean ablation), file by file:

1. ``conf/patcher/mean.yaml``: names the class and its arguments.
2. ``jobs/find.py`` ``find``: makes the parts of a run, small ones first.
3. ``config.py`` ``build``: makes an object of a configuration, once it is sure that its class may be loaded.
4. ``patchers/mean.py`` ``Mean``: what it needs (``needs``: the mean over the corrupt prompts) and what it gives (``patch``).
5. ``runner.py`` ``Runner``: hands it to the engine, which it tells to prepare.
6. ``engine/packed/engine.py`` ``PackedEngine``: runs the corrupt prompts once, and asks for the values of all units.
7. ``engine/packed/replacements.py`` ``Replacements``: takes the means, and has the patcher make values of them, head by head.
8. ``engine/packed/packed_pass.py`` ``PackedPass``: in a layer of a pass, lays them over the outputs of heads that a mask removes.
9. ``models/layer.py`` ``Layer``: ``z = ...`` puts the result in the place of what the heads gave.

``patchers/base.py`` looks at what ``patch`` gave, and hands it on. Between 7 and 8 ``engine/packed/lane.py`` decides which masks and
prompts share a pass, and where it starts; it sees no value.
"""

from circuitkit.engine.base import Baseline, Engine
from circuitkit.engine.oracle.nodes import ReferenceEngine
from circuitkit.engine.packed.engine import PackedEngine

__all__ = ["Baseline", "Engine", "PackedEngine", "ReferenceEngine"]
