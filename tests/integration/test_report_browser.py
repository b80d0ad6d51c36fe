"""The report as its reader gets it: made by the command line, opened in a real browser without a network, and printed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands_for_tests import circuitkit

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from study_for_tests import write_study  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "</script><script>alert(1)</script><img src=http://localhost/x onerror=alert(1)>&amp;<b>$x$"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,1000"]  # fmt: skip

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine (apt-get install chromium)")


class Page:
    """A page in a browser that is driven over two pipes, as its DevTools protocol has it."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        command, self._to_browser = os.pipe()
        self._from_browser, answer = os.pipe()
        # The browser reads commands from 3 and writes answers to 4.
        script = f'exec "$@" 3<&{command} 4>&{answer} 2>/dev/null'
        arguments = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(["bash", "-c", script, "bash", *arguments], pass_fds=(command, answer))
        os.close(command)
        os.close(answer)
        self._buffer, self._last, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **({"sessionId": self._session} if self._session else {})}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def of(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to_browser)
        os.close(self._from_browser)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 90
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._from_browser, 1 << 16)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """A study of the size of GPT-2 with markup in every text, and one file damaged; its report and how long it took."""
    folder = write_study(tmp_path_factory.mktemp("report") / "study", model="gpt2", evil=EVIL)
    (folder / "months" / "evaluation.json").write_text("{")
    started = time.monotonic()
    done = circuitkit("job=report", f"run={folder}", cwd=folder.parent)
    return folder, done, time.monotonic() - started


@pytest.fixture(scope="module")
def opened(made, tmp_path_factory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    page.open(made[0] / "report.html")
    page.value("new Promise(done => setTimeout(done, 500))")  # for whatever a page might do late
    yield page
    page.close()


def test_the_job_says_what_it_wrote_and_what_is_damaged(made):
    folder, done, _ = made
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == f"written: {folder}/report.html"
    assert "months/evaluation.json is damaged or cut off" in done.stderr + done.stdout
    assert "months/evaluation.json is damaged or cut off" in (folder / "report.html").read_text()
    assert {f"circuit-{task}.{ending}" for task in ("months", "numerals-2") for ending in ("dot", "graphml")} - {
        path.name for path in (folder / "figures").iterdir()
    } == {"circuit-numerals-2.dot", "circuit-numerals-2.graphml"}


@needs_browser
@pytest.mark.slow
def test_every_figure_is_also_a_file(made):
    folder, _, seconds = made
    plots = (folder / "report.html").read_text().count('type="application/json" data-plot=')
    files = list((folder / "figures").glob("*.svg"))
    assert len(files) == plots > 25
    assert all(b"<svg" in path.read_bytes()[:200] and path.stat().st_size > 3000 for path in files)
    assert not any(b"<script" in path.read_bytes() for path in files)
    assert seconds < 60, "20 on a machine that does nothing else"


@needs_browser
@pytest.mark.slow
def test_it_opens_without_a_word_in_the_console_and_without_a_network(opened):
    assert opened.of("Runtime.exceptionThrown") == []
    assert [entry["entry"]["text"] for entry in opened.of("Log.entryAdded")] == []
    assert [entry["args"] for entry in opened.of("Runtime.consoleAPICalled")] == []
    asked = {event["request"]["url"].partition(":")[0] for event in opened.of("Network.requestWillBeSent")}
    assert asked <= {"file", "data"}, "data are the cells of heat maps"
    assert len([event for event in opened.of("Network.requestWillBeSent") if event["request"]["url"].startswith("file")]) == 1
    assert opened.of("Page.javascriptDialogOpening") == []


@needs_browser
@pytest.mark.slow
def test_every_figure_is_drawn_at_its_size(opened):
    plots = opened.value("document.querySelectorAll('.plot').length")
    drawn = opened.value(
        """[...document.querySelectorAll('.plot')].map(plot => ({
            name: plot.id,
            width: plot.querySelector('svg.main-svg')?.clientWidth,
            marks: plot.querySelectorAll('svg path, svg image').length,
        }))"""
    )
    assert len(drawn) == plots > 25
    assert [each for each in drawn if each["width"] != 900 or each["marks"] < 3] == []
    assert opened.value("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut at 1280 pixels"
    assert opened.value("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href')))")


@needs_browser
@pytest.mark.slow
def test_texts_are_shown_as_they_are(opened):
    assert opened.value("document.querySelectorAll('main b, main img, svg b').length") == 0
    assert opened.value("document.querySelector('table').textContent").count("<script>alert(1)</script>") == 3
    ticks = "[...document.querySelectorAll('svg text')].map(text => text.textContent).join('|')"
    assert "numerals</script>" in opened.value(ticks).replace("|", ""), "in labels of figures too"


@needs_browser
@pytest.mark.slow
def test_it_prints_on_a4(opened, tmp_path):
    printed = base64.b64decode(opened.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 100_000
    assert b"/MediaBox [0 0 594.95996 841.91998]" in printed or b"/MediaBox [0 0 595" in printed
    # On paper a figure is scaled to the width between the margins, and no taller than a page.
    opened.send("Emulation.setEmulatedMedia", media="print")
    sizes = opened.value("[...document.querySelectorAll('figure')].map(each => each.getBoundingClientRect().height)")
    widths = opened.value("[...document.querySelectorAll('.plot')].map(each => each.getBoundingClientRect().width)")
    opened.send("Emulation.setEmulatedMedia", media="")
    assert max(widths) <= 703 and max(sizes) <= 1020


def test_what_cannot_be_reported_is_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, words in (("nowhere", "found no folder nowhere"), ("empty", "nothing to report on in empty")):
        done = circuitkit("job=report", f"run={folder}", cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_without_a_browser_the_page_is_made_all_the_same(tmp_path):
    folder = write_study(tmp_path / "study", model="tiny", n_layers=4, n_heads=8)
    done = circuitkit("job=report", f"run={folder}", cwd=tmp_path, BROWSER_PATH=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "apt-get install chromium" in (folder / "report.html").read_text()
    assert not list((folder / "figures").glob("*.svg")) and list((folder / "figures").glob("*.graphml"))


@pytest.mark.slow
def test_each_figure_is_media_of_the_wandb_run(tmp_path):
    folder = write_study(tmp_path / "study", model="tiny", n_layers=4, n_heads=8)
    home = {"HOME": str(tmp_path), "BROWSER_PATH": str(tmp_path / "none")}
    wandb = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    arguments = ["job=report", f"run={folder}", "logger=wandb", "logger.wandb.mode=offline", "logger.wandb.folder=here"]
    done = circuitkit(*arguments, cwd=tmp_path, **home, **wandb)
    assert done.returncode == 0, done.stderr
    media = list(tmp_path.glob("here/wandb/offline-run-*/files/media/plotly/**/*.plotly.json"))
    plots = (folder / "report.html").read_text().count('type="application/json" data-plot=')
    assert len(media) == plots > 25
    (knockout,) = (path for path in media if "knockout-knockout-months" in path.name)
    values = json.loads((folder / "knockout-months" / "scores.json").read_text())["values"]
    assert json.loads(knockout.read_text())["data"][0]["z"][0][0] == values["a0.h0"]
