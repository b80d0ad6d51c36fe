"""TransformerLens as a competitor: a worker in its own environment, asked over a pipe, so that rounds can take turns."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import say
from circuitkit.core.prompts import PromptSet
from circuitkit.models.hooked import HookedModel

HERE = Path(__file__).parent / "transformer_lens"
PYTHON = Path(__file__).parents[2] / ".bench" / "transformer_lens" / "bin" / "python"


class TransformerLens:
    """Runs the single-node map with TransformerLens' patching helper. A context manager.

    Args:
        model: Whose weights it loads.
        prompts: The prompts.
    """

    def __init__(self, model: HookedModel, prompts: PromptSet) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        model.hf.save_pretrained(folder / "model")
        columns = {name: getattr(prompts, name) for name in ("clean", "corrupt", "answers", "wrongs")}
        torch.save(columns, folder / "prompts.pt")
        command = [str(PYTHON), str(HERE / "worker.py"), str(folder), str(torch.get_num_threads())]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.version: str = self._ask(do="version")

    @staticmethod
    def is_there() -> bool:
        """Whether its environment was made; says how to if not."""
        if not PYTHON.exists():
            say("TransformerLens is not installed and does not take part: bash scripts/bench/transformer_lens/setup.sh")
        return PYTHON.exists()

    def scores(self, nodes: Sequence[str]) -> torch.Tensor:
        """Mean logit difference with each node replaced by its mean, one forward pass a node."""
        return torch.tensor(self._ask(do="scores", nodes=list(nodes)))

    def flops(self, nodes: Sequence[str]) -> int:
        """FLOPs of the same."""
        return self._ask(do="flops", nodes=list(nodes))

    def peak_bytes(self, nodes: Sequence[str]) -> int | None:
        """Peak memory of the same."""
        return self._ask(do="peak_bytes", nodes=list(nodes))

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The TransformerLens worker ended:\n{Path(self._log.name).read_text()[-2000:]}")
        return json.loads(answer)

    def __enter__(self) -> TransformerLens:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()
