"""Answers questions about the single-node map with TransformerLens, one JSON object a line. Runs in TransformerLens' environment.

The map is taken with its own helper, ``transformer_lens.patching.generic_activation_patch``: for heads exactly what
``get_act_patch_attn_head_out_all_pos`` runs, for MLPs the same over whole layers. The helper's "clean cache" holds the means.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas
import torch
from bench.measure import flops, peak_bytes
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM


class Worker:
    """Holds the model, the prompts and the means.

    Args:
        folder: With the weights in ``model`` and the prompts in ``prompts.pt``.
    """

    def __init__(self, folder: Path) -> None:
        hf = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        self.model = TransformerBridge.boot_transformers(str(folder / "model"), hf_model=hf)
        self.prompts = torch.load(folder / "prompts.pt")
        self.means: dict[str, torch.Tensor] = {}

    def prepare(self) -> None:
        """Means over the corrupt prompts, a row per prompt."""
        wanted = ("attn.hook_z", "hook_mlp_out")
        _, cache = self.model.run_with_cache(self.prompts["corrupt"], names_filter=lambda name: name.endswith(wanted))
        self.means = {name: act.mean(0, keepdim=True).expand_as(act) for name, act in cache.items()}

    def scores(self, nodes: list[str]) -> list[float]:
        """Mean logit difference without each node."""
        heads = [(int(layer), int(head)) for layer, head in (node[1:].split(".h") for node in nodes if node[0] == "a")]
        mlps = [(int(node[1:]),) for node in nodes if node[0] == "m"]
        found = iter(self._patch("z", ["layer", "head"], heads, patching.layer_head_vector_patch_setter))
        found_mlps = iter(self._patch("mlp_out", ["layer"], mlps, lambda act, index, mean: mean))
        return [next(found if node[0] == "a" else found_mlps) for node in nodes]

    def _patch(self, act: str, axes: list[str], indices: list[tuple[int, ...]], setter) -> list[float]:
        if not indices:
            return []
        table = pandas.DataFrame(indices, columns=axes)
        patched = patching.generic_activation_patch(self.model, self.prompts["clean"], self.means, self.metric, setter, act, index_df=table)
        return patched.tolist()

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Logit difference at the last position."""
        last = logits[:, -1]
        right, wrong = (last.gather(-1, self.prompts[name][:, None]) for name in ("answers", "wrongs"))
        return (right - wrong).mean()

    def answer(self, question: dict):
        """Does what is asked."""
        nodes = question.get("nodes", [])
        jobs = {
            "version": lambda: version("transformer-lens"),
            "scores": lambda: self.scores(nodes),
            "flops": lambda: flops(lambda: self.scores(nodes)),
            "peak_bytes": lambda: peak_bytes(lambda: self.scores(nodes)),
        }
        return jobs[question["do"]]()


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(sys.argv[2]))
    worker = Worker(Path(sys.argv[1]))
    worker.prepare()
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
