"""Which types of language models can be taken apart: each is made tiny, resolved, and proved against the plain forward pass."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from circuitkit.core.errors import ConfigError, UserError, unknown_choice
from circuitkit.core.findings import Finding
from circuitkit.engine.packed.engine import PackedEngine
from circuitkit.engine.proof.derived import DERIVED_CHECKS
from circuitkit.engine.proof.doctor import Patient, any_mask
from circuitkit.evaluation.generation import generate
from circuitkit.jobs.doctor import number
from circuitkit.metrics import LogitDiff
from circuitkit.models.checks import MODEL_CHECKS, Check, plain, random_prompts
from circuitkit.models.hooked import HookedModel
from circuitkit.models.tiny import causal_types, tiny_model
from circuitkit.patchers import Mean, Resample, Zero
from circuitkit.results import versions
from circuitkit.storage import save_finding

N_PROMPTS, N_POS, N_NEW = 3, 8, 4
SECONDS = 120.0

VERDICTS = {
    "proved": "every check passed",
    "in part": "what is defined was proved; the rest is refused",
    "refused": "the model is not taken, with the reason",
    "failed": "a check failed: numbers would be wrong",
    "bug": "an error that is no refusal",
    "not made": "no tiny model could be made or run",
}


@dataclass(frozen=True)
class TypeReport:
    """What came out for one type.

    Attributes:
        model_type: As transformers names it.
        verdict: One of ``VERDICTS``.
        why: The reason, where it is not proved.
        checks: What was checked, in order; a refused or broken one has NaN as its difference and says so in its detail.
        seconds: How long all of it took.
    """

    model_type: str
    verdict: str
    why: str = ""
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0


def run(config: DictConfig) -> None:
    """Examines the types that ``job.types`` names and prints a row each; with ``dir`` set, writes ``models.json`` there too.

    Raises:
        ConfigError: An unknown type.
    """
    types = chosen(config.job.types)
    console = Console(highlight=False)
    reports: list[TypeReport] = []
    with console.status("") as status:
        for model_type in types:
            status.update(f"{model_type} ({len(reports) + 1} of {len(types)})")
            reports.append(examine_type(model_type, float(config.job.seconds)))
    show(reports, console)
    if config.dir:
        console.print(f"written: {save_finding(finding(reports), Path(config.dir))}", soft_wrap=True)


def chosen(types: str | Sequence[str]) -> tuple[str, ...]:
    """The types that a user asks for.

    Args:
        types: Some of them, or ``all``.

    Raises:
        ConfigError: transformers has no such type, or none was named.
    """
    known = causal_types()
    if types == "all":
        return known
    wanted = (types,) if isinstance(types, str) else tuple(types)
    if not wanted:
        raise ConfigError("No type of model was named. Set job.types to some, such as job.types=[llama,gemma3_text], or to all.")
    for each in wanted:
        if each not in known:
            raise ConfigError(unknown_choice(f"type of causal language model in transformers {versions()['transformers']}", each, known))
    return wanted


def examine_type(model_type: str, seconds: float = SECONDS) -> TypeReport:
    """Makes a tiny model of a type and checks it in every way. Never raises; whatever happens is in the report.

    Args:
        model_type: As transformers names it.
        seconds: After which it is given up, where the platform can say so.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    try:
        with within(seconds):
            verdict, why = _examined(model_type, checks)
    except TimeUp:
        verdict, why = "bug", f"not done within {seconds:g} s, after {checks[-1].name if checks else 'nothing'}"
    return TypeReport(model_type, verdict, why, tuple(checks), time.perf_counter() - start)


def _examined(model_type: str, checks: list[Check]) -> tuple[str, str]:
    """The verdict and the reason for it; checks are added as they are done."""
    try:
        hf = tiny_model(model_type)
        ids = torch.arange(2 * N_POS).view(2, N_POS)
        with torch.no_grad():
            logits = hf(ids, use_cache=False).logits
    except UserError as error:
        return "not made", str(error)
    except Exception as error:
        return "not made", broken(error)
    if logits.shape[:2] != ids.shape or not logits.isfinite().all():
        return "not made", f"logits of {tuple(ids.shape)} tokens are {tuple(logits.shape)}, or not finite"
    try:
        model = HookedModel(hf, name=model_type)
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        return "bug", f"not resolved: {broken(error)}"
    prompts = random_prompts(model, N_PROMPTS, N_POS)
    patient = Patient(model, prompts, Zero(), Resample(), Mean(), Mean("conditional"), LogitDiff(), PackedEngine)
    found = [_outcome(check, model, prompts) for check in MODEL_CHECKS]
    checks.extend(check for check, _ in found)
    for each in (any_mask, *DERIVED_CHECKS, generation):
        found.append(_outcome(each, patient))
        checks.append(found[-1][0])
    return judged(found)


def judged(found: Sequence[tuple[Check, str]]) -> tuple[str, str]:
    """The verdict over some checks, each with ``""``, ``refused`` or ``bug``, and what to say about it."""
    for verdict, chosen in (
        ("bug", [check for check, trouble in found if trouble == "bug"]),
        ("failed", [check for check, trouble in found if not trouble and not check.passed]),
        ("in part", [check for check, trouble in found if trouble == "refused"]),
    ):
        if chosen:
            return verdict, "; ".join(f"{check.name}: {check.detail or number(check.difference)}" for check in chosen)
    return "proved", ""


def _outcome(check: Callable[..., Check], *given: Any) -> tuple[Check, str]:
    """A check, and ``refused`` or ``bug`` if it raised."""
    try:
        return check(*given), ""
    except UserError as error:
        trouble, detail = "refused", str(error)
    except Exception as error:
        trouble, detail = "bug", broken(error)
    what = (check.__doc__ or "").strip().split("\n", 1)[0]
    return Check(check.__name__, what, math.nan, 0.0, passed=False, detail=f"{trouble}: {detail}"), trouble


def generation(patient: Patient) -> Check:
    """Greedy generation gives the tokens of plain forward passes, and with components out the same with a cache as without."""
    model, ids, universe = patient.model, patient.prompts.clean, patient.model.universe
    masks = torch.stack([universe.full(), universe.full()])
    masks[1, len(universe) // 2] = False
    cached, anew = (
        generate(model, ids, masks, patient.zero, max_new_tokens=N_NEW, use_cache=use_cache).tokens for use_cache in (True, False)
    )
    grown = ids
    for _ in range(N_NEW):
        grown = torch.cat([grown, plain(model, grown)[:, -1:].argmax(-1).to(grown)], -1)
    expected = grown[:, ids.shape[1] :]
    untouched = cached[0]
    wrong = int((cached != anew).sum()) + int(((untouched != expected) & (untouched >= 0)).sum())
    what = "generated tokens = those of plain passes, and with a cache = without (number that differ)"
    return Check.of("generation", what, wrong, 0.0)


class TimeUp(BaseException):
    """A type took too long. No ``Exception``, so that no check takes it for its own failure."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises ``TimeUp`` when the block takes longer; without effect outside of the main thread and where there are no timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def broken(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def made_with() -> str:
    """What the rows hold for."""
    return f"torch {torch.__version__}, transformers {versions()['transformers']}"


def show(reports: Sequence[TypeReport], console: Console) -> None:
    """Prints a row a type, then how many there are of each verdict."""
    table = Table("type", "verdict", "checks", "largest error", "why", box=None, pad_edge=False)
    for report in reports:
        style = "bold red" if report.verdict in ("failed", "bug") else None
        passed = sum(check.passed for check in report.checks)
        table.add_row(report.model_type, report.verdict, f"{passed}/{len(report.checks)}", _worst(report), report.why, style=style)
    console.print(table)
    counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in VERDICTS}
    console.print("\n" + "\n".join(f"{count:4d} {verdict}: {VERDICTS[verdict]}" for verdict, count in counts.items() if count))
    console.print(f"{made_with()}; tiny random models in float32. Differences are relative to the spread of what is expected.")


def _worst(report: TypeReport) -> str:
    differences = [check.difference for check in report.checks if check.passed]
    return number(max(differences)) if differences else ""


def finding(reports: Sequence[TypeReport]) -> Finding[dict[str, Any]]:
    """The reports as a result that can be kept; a difference that is no number is None."""
    rows = [asdict(report) for report in reports]
    for row in rows:
        for check in row["checks"]:
            check["difference"] = check["difference"] if math.isfinite(check["difference"]) else None
    return Finding("models", f"Types of language models, {made_with()}", {"types": rows}, {"versions": versions()})
