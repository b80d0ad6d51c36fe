"""The report: figures show just what the findings say, texts stay texts, and what is damaged is left out in words."""

import json
import random
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import networkx
import pytest
from study_for_tests import TASKS, compare, cross_task, edges, evaluation, roles, stability, transfer, write_study

from circuitkit.core.circuit import Circuit, Scores
from circuitkit.core.edge_universe import EdgeUniverse
from circuitkit.core.errors import ConfigError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Edge, Level, Node
from circuitkit.report import static
from circuitkit.report.blocks import Drawing, Section, Table
from circuitkit.report.contents import FINDINGS, sections
from circuitkit.report.figures.circuit_graph import circuit_graph
from circuitkit.report.figures.layout import layered
from circuitkit.report.figures.maps import is_map, knockout, shape_of
from circuitkit.report.figures.overlap import colour_of, overlap, owners
from circuitkit.report.figures.style import BLUE, GOLD, GREEN, INK, ORANGE, PURPLE, RED, interval, number, shown_interval
from circuitkit.report.needs import check_installed
from circuitkit.report.page import embedded, page
from circuitkit.report.reading import read
from circuitkit.storage import save, save_finding
from circuitkit.storage.exchange import graph_of, to_dot, to_graphml, to_json

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;<b>$x$"


def nodes(*names):
    return tuple(map(Node.parse, names))


CIRCUIT = Circuit(nodes("a0.h1", "m0", "a1.h0", "m1"), 2, 2, "toy", 80.5)
EDGES = tuple(map(Edge.parse, ("input->a0.h1<v>", "a0.h1->m0", "a0.h1->a1.h0<q>", "m0->a1.h0<k>", "a1.h0->logits")))
WITH_EDGES = Circuit(CIRCUIT.nodes, 2, 2, "toy", 75.0, Level.EDGE_QKV, edges=EDGES)


def drawings(blocks):
    return [block for block in blocks if isinstance(block, Drawing)]


def named(blocks, start):
    (found,) = (block for block in drawings(blocks) if block.name.startswith(start))
    return found


def about(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


# The figures' values


def test_a_knock_out_map_has_every_score_in_its_cell():
    scores = Scores({"a0.h0": 100.0, "a0.h1": 40.0, "m0": 97.5, "a1.h0": 101.0, "a1.h1": 99.0, "m1": -3.0}, "% of the model", 2, 2)
    (drawing,) = knockout("months", scores, marked=["m1"])
    (heat,) = drawing.figure.data
    assert [list(row) for row in heat.z] == [[100.0, 40.0, 97.5], [101.0, 99.0, -3.0]]
    assert (list(heat.x), list(heat.y)) == (["h0", "h1", "MLP"], ["0", "1"])
    assert heat.zmid == 100 and heat.zmin == -3.0 and heat.zmax == 203.0
    (frame,) = drawing.figure.layout.shapes
    assert (frame.x0 + frame.x1, frame.y0 + frame.y1) == (4, 2), "around m1: third column, second row"


def test_a_knock_out_by_position_has_a_map_for_each():
    scores = Scores({"a0.h0@S1": 90.0, "m0@S1": 80.0, "a0.h0@last": 70.0, "m0@last": 60.0}, "%", 1, 1)
    found = knockout("months", scores)
    assert [[list(row) for row in each.figure.data[0].z] for each in found] == [[[90.0, 80.0]], [[70.0, 60.0]]]
    assert "position S1" in found[0].caption and "position last" in found[1].caption
    assert is_map(scores) and not is_map(Scores({"draw0": 3.0}, "%", 1, 1))
    assert shape_of(["a3.h7", "m9"]) == (10, 8)


def test_a_large_model_is_drawn_without_numbers_in_the_cells():
    scores = Scores({f"a{layer}.h{head}": 100.0 for layer in range(32) for head in range(32)}, "%", 32, 32)
    (drawing,) = knockout("llama", scores)
    assert drawing.figure.data[0].text is None and len(drawing.figure.data[0].z) == 32


def test_the_circuit_graph_has_every_node_and_edge_once():
    drawing = circuit_graph("toy", WITH_EDGES, {"a0.h1->m0": 10.0, "m0->a1.h0<k>": 0.5})
    dots = [trace for trace in drawing.figure.data if trace.mode == "markers+text"]
    assert sorted(name for trace in dots for name in trace.hovertext) == ["a0.h1", "a1.h0", "input", "logits", "m0", "m1"]
    lines = [trace for trace in drawing.figure.data if trace.mode == "lines" and trace.hovertext is not None]
    assert {text for trace in lines for text in trace.hovertext if text} == {
        "input->a0.h1<v>", "a0.h1->m0: 10.00 points", "a0.h1->a1.h0<q>", "m0->a1.h0<k>: 0.50 points", "a1.h0->logits"
    }  # fmt: skip
    widths = {text.partition(":")[0]: trace.line.width for trace in lines for text in trace.hovertext}
    assert widths["a0.h1->m0"] > widths["m0->a1.h0<k>"], "what costs more is drawn stronger"
    (ports,) = (trace for trace in drawing.figure.data if trace.mode == "markers")
    assert set(ports.hovertext) == {"a0.h1<v>", "a1.h0<q>", "a1.h0<k>"}
    assert "5 direct paths" in drawing.caption


def test_a_circuit_of_nodes_is_drawn_without_paths():
    drawing = circuit_graph("toy", CIRCUIT)
    assert all(trace.mode == "markers+text" for trace in drawing.figure.data)
    assert "not searched" in drawing.caption


def test_the_layout_goes_from_bottom_to_top():
    places = layered([*nodes("a0.h0", "a0.h1", "m0", "a5.h3", "m5"), *nodes("input", "logits")])
    heights = [places[name][1] for name in ("input", "a0.h0", "m0", "a5.h3", "m5", "logits")]
    assert heights == sorted(heights) and len(set(heights)) == 6
    assert places["a0.h0"][1] == places["a0.h1"][1] and places["a0.h0"][0] < places["a0.h1"][0] < places["m0"][0]
    assert places["m0"][0] == places["m5"][0]
    assert len(set(places.values())) == len(places)
    many = layered(Node.of_head(0, head) for head in range(40))
    assert len(set(many.values())) == 40 and max(x for x, _ in many.values()) - min(x for x, _ in many.values()) < 13


def test_overlap_colours_are_those_of_the_paper():
    three = ("numerals", "numwords", "months")
    assert [colour_of([label], three) for label in three] == [RED, BLUE, GOLD]
    pairs = {("numerals", "numwords"): PURPLE, ("numerals", "months"): ORANGE, ("numwords", "months"): GREEN}
    assert {who: colour_of(who, three) for who in pairs} == pairs
    assert colour_of(three, three) == INK
    assert [colour_of(who, ("a", "b")) for who in (["a"], ["b"], ["a", "b"])] == [RED, BLUE, INK]
    many = [str(label) for label in range(30)]
    assert len({colour_of([label], many[:6]) for label in many[:6]} | {colour_of(many[:2], many[:6]), colour_of(many[:6], many[:6])}) == 8
    assert colour_of(many[:3], many) == colour_of(many[5:7], many)


def test_the_overlap_shows_each_member_once_under_its_owners():
    circuits = {"a": WITH_EDGES, "b": Circuit(nodes("a0.h1", "m1"), 2, 2, "toy"), "c": Circuit(nodes("a0.h1", "a1.h1"), 2, 2, "toy")}
    assert owners(circuits)["m1"] == ("a", "b") and owners(circuits)["a0.h1"] == ("a", "b", "c")
    drawing, table = overlap(circuits)
    shown = {text: trace.marker.color for trace in drawing.figure.data if trace.mode == "markers+text" for text in trace.hovertext}
    assert shown["a0.h1: a, b, c"] == INK and shown["m1: a, b"] == PURPLE and shown["a1.h1: c"] == GOLD and shown["m0: a"] == RED
    n_edges = len(WITH_EDGES.edges)  # all of them a's alone
    assert table.rows[0] == ("all", "1", "0", "0", "a0.h1")
    assert ("a only", "1", "1", str(n_edges), "m0 a1.h0") in table.rows


def test_an_evaluation_is_drawn_as_it_was_measured():
    body = evaluation("toy", CIRCUIT, random.Random(0))
    body |= {
        "score": about(80.5, 78.0, 84.0),
        "removed_from_circuit": {"a0.h1": {**about(50.5, 49.5, 52.5), "drop": 30.0}, "m1": {**about(80.0, None, None), "drop": 0.5}},
        "removed_from_model": {"a0.h1": {**about(66.0), "drop": 34.0}, "m1": {**about(None), "drop": None}},
    }
    blocks = FINDINGS["evaluation"][1]("toy", body)
    bars = named(blocks, "removed-from-circuit").figure.data[0]
    assert (list(bars.x), list(bars.y)) == (["a0.h1", "m1"], [30.0, 0.5])
    assert (list(bars.error_y.array), list(bars.error_y.arrayminus)) == ([1.0, 0.0], [2.0, 0.0]), "a drop has the score's interval, turned"
    assert "any one of 20 heads costs 1.4 points" in named(blocks, "removed-from-model").caption
    heat = named(blocks, "removed-from-model").figure.data[0]
    assert [list(row) for row in heat.z] == [[None, 66.0, None], [None, None, None]]
    box, dot = named(blocks, "random").figure.data
    assert list(box.x) == body["random_circuits"]["scores"]
    assert (list(dot.x), list(dot.error_x.array), list(dot.error_x.arrayminus)) == ([80.5], [3.5], [2.5])
    points = [(x, y) for trace in named(blocks, "prompts").figure.data[1:] for x, y in zip(trace.x, trace.y, strict=True)]
    assert sorted(points) == sorted((each["clean"], each["circuit"]) for each in body["prompts"])
    assert isinstance(blocks[0], Table) and ("score of the circuit alone", "80.5 % [78.0, 84.0]") in blocks[0].rows


def test_an_evaluation_with_little_in_it_shows_that():
    body = evaluation("toy", CIRCUIT, random.Random(0))
    for key in ("removed_from_circuit", "removed_from_model", "sets_removed_from_model", "prompts"):
        body[key] = {}
    body["random_circuits"]["scores"] = []
    assert drawings(FINDINGS["evaluation"][1]("toy", body)) == []


def test_the_cross_task_matrix_has_a_row_for_each_circuit():
    body = cross_task("toy", ["a", "b"], random.Random(0))
    (drawing,) = FINDINGS["cross_task"][1]("toy", body)
    (heat,) = drawing.figure.data
    assert [list(row) for row in heat.z] == [[cell["value"] for cell in row] for row in body["percent"]]
    assert list(drawing.figure.layout.yaxis.ticktext) == ["a", "b", "random (control)"]
    assert heat.text[0][0].startswith("81.0\n[")


def test_edges_are_drawn_with_what_they_cost():
    body = edges("toy", CIRCUIT, random.Random(3)) | {"node_score": 81.0}
    names = [str(edge) for edge in EdgeUniverse(CIRCUIT.nodes).edges]
    body |= {"edges": {**dict.fromkeys(names, 80.9), "a0.h1->m0": 60.0}, "kept": ["a0.h1->m0"]}
    drawing, numbers, strongest = FINDINGS["edges"][1]("toy", body)
    assert ("edges tested", str(len(names))) in numbers.rows and ("edges kept", "1") in numbers.rows
    assert strongest.rows[0] == ("a0.h1->m0", "21.00 points", "kept")
    assert "1 direct path" in drawing.caption


def test_roles_are_drawn_as_they_were_measured():
    body = roles("toy", CIRCUIT, random.Random(0))
    blocks = FINDINGS["roles"][1]("toy", body)
    assert sorted(blocks[1].rows) == [("a0.h1", "none"), ("a1.h0", "successor (0.61; 0.004)")] and "random keys" in blocks[1].header[1]
    first, second = named(blocks, "attention").figure.data
    mean = body["patterns"]["a0.h1"]["mean"]
    assert first.z[5][3] == mean[5][3] and first.z[3][5] is None, "no token attends to a later one"
    assert list(named(blocks, "attention").figure.layout.xaxis.ticktext)[:2] == ["<bos>", "␣Van"]
    lens = {(trace.name, trace.yaxis): list(trace.y) for trace in named(blocks, "logit-lens").figure.data}
    assert lens["answer", "y"] == [100 * value for value in body["logit_lens"]["answer_top1"]]
    assert lens["last shown member", "y2"] == body["logit_lens"]["wrong_logit"]
    site = body["logit_lens"]["sites"].index(body["logit_lens"]["switch_site"])
    assert {line.x0 for line in named(blocks, "logit-lens").figure.layout.shapes} == {site}
    bars = named(blocks, "attribution").figure.data[0]
    assert dict(zip(bars.x, bars.y, strict=True)) == body["attribution"]["nodes"]
    dots = named(blocks, "ov").figure.data[1]
    assert list(zip(dots.x, dots.y, strict=True)) == [(body["ov"]["copy"][head], body["ov"]["next"][head]) for head in body["ov"]["copy"]]
    assert blocks[-1].text.startswith("Left out, QK")


def test_a_part_that_was_not_analysed_is_no_part_of_the_report():
    body = roles("toy", CIRCUIT, random.Random(0)) | {"ov": None, "logit_lens": {}, "patterns": {}, "skipped": {}}
    assert [each.name.partition("-")[0] for each in drawings(FINDINGS["roles"][1]("toy", body))] == ["attribution"]


def test_transfer_bars_stand_beside_their_random_controls():
    body = transfer("toy", CIRCUIT, random.Random(0))
    figure = named(FINDINGS["transfer"][1]("toy", body), "transfer").figure
    bars = {trace.name: trace for trace in figure.data if trace.type == "bar"}
    tasks = [each["name"] for each in body["tasks"]]
    for label, trace in bars.items():
        assert list(trace.x) == pytest.approx([100 * body["accuracy"][task][label]["mean"] for task in tasks])
        assert list(trace.error_x.array) == pytest.approx([5.0] * 4) and list(trace.error_x.arrayminus) == pytest.approx([6.0] * 4)
    assert [label for label, trace in bars.items() if trace.marker.pattern.shape == "/"] == ["random heads"]
    dots = [trace for trace in figure.data if trace.type == "scatter"]
    assert [sorted(trace.x) for trace in dots] == [
        pytest.approx(sorted(100 * draw for draw in body["accuracy"][task]["random heads"]["draws"])) for task in tasks
    ]
    place = bars["random heads"]
    assert all(abs(y - spot) < 0.5 * place.width for trace, spot in zip(dots, place.y, strict=True) for y in trace.y)


def test_stability_is_a_map_of_shares():
    body = stability("toy", "toy", CIRCUIT, random.Random(0))
    blocks = FINDINGS["stability"][1]("toy", body)
    heat = named(blocks, "stability").figure.data[0]
    assert heat.z[0][1] == 100 * body["nodes"]["a0.h1"]["share"] == 100.0
    tables = [block for block in blocks if isinstance(block, Table)]
    assert ("order", "–") in tables[1].rows and len(tables[2].rows) == 6


def test_a_comparison_is_a_table():
    body = compare({"a": "first", "b": "second"}, {"a": CIRCUIT, "b": WITH_EDGES.nodes_only()})
    _, pairs = FINDINGS["compare"][1]("toy", body)
    assert pairs.rows == (("first and second", "4", "1.00", "0.71", "3.2e-07"),)


def test_numbers_are_numbers():
    assert interval(about(5.0, 4.0, 7.0)) == (5.0, 2.0, 1.0)
    assert interval(about(None)) == (None, None, None) and interval(about(5.0)) == (5.0, None, None)
    assert shown_interval(about(5.04, 4.0, 7.0)) == "5.0 % [4.0, 7.0]" and shown_interval(None) == "–"
    for wrong in ("5", True, [5]):
        with pytest.raises(TypeError, match="a number was expected"):
            number(wrong)


# Graphs for other programs


def test_the_graph_in_three_formats(tmp_path):
    graph = graph_of(WITH_EDGES, layered([*WITH_EDGES.nodes, *nodes("input", "logits")]), {"a0.h1->m0": 60.0, "a0.h1": 70.0})
    back = networkx.parse_graphml(to_graphml(graph), force_multigraph=True)
    assert set(back.edges(keys=True)) == {(str(each.src), str(each.dst.component_of_port), each.dst.port or "in") for each in EDGES}
    assert back.nodes["a0.h1"]["weight"] == 70.0 and back.nodes["m1"]["kind"] == "mlp"
    plain = json.loads(to_json(graph))
    assert {each["name"] for each in plain["edges"]} == {str(each) for each in EDGES}
    assert {each["id"] for each in plain["nodes"]} == {"input", "logits", *CIRCUIT.names}
    dot = to_dot(graph)
    assert '"a0.h1" -> "m0" [weight_percent=60];' in dot and '"a0.h1" -> "a1.h0" [label="q"];' in dot
    assert dot.count(" -> ") == len(EDGES) and dot.count("pos=") == 6
    ElementTree.fromstring(to_graphml(graph))
    assert to_dot(graph_of(CIRCUIT, layered(CIRCUIT.nodes))).count(" -> ") == 0


# The page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "small", model="tiny", n_layers=4, n_heads=8)


def test_a_study_has_a_section_for_everything_in_it(study):
    material = read(study)
    parts, problems = sections(material)
    assert problems == [] and material.problems == ()
    titles = " / ".join(part.title for part in parts)
    for kind in ("Summary", "Evaluation", "Circuit: months", "Overlap in tiny", "Paths", "Comparison", "Across tasks", "Stability",
                 "Roles in numerals", "Transfer", "Knock-out", "Random circuits", "Settings"):  # fmt: skip
        assert kind in titles
    names = [each.name for part in parts for each in drawings(part.blocks)]
    assert len(names) == len(set(names)) > 20
    assert all(each.caption.endswith(".") and 40 < len(each.caption) for part in parts for each in drawings(part.blocks))
    table = parts[0].blocks[0]
    assert [row[0] for row in table.rows] == sorted(TASKS) and all("80.4 % [78.4, 82.4]" in row for row in table.rows)


def test_a_single_run_needs_no_overlap(study):
    parts, problems = sections(read(study / "months"))
    assert problems == []
    assert [part.title for part in parts] == ["Summary", "Evaluation: months", "Circuit: months", "Settings and provenance"]
    assert any(each.name.startswith("search") for part in parts for each in drawings(part.blocks))


def test_texts_stay_texts(tmp_path):
    write_study(tmp_path, model=EVIL, n_layers=4, n_heads=8, evil=EVIL)
    parts, problems = sections(read(tmp_path))
    assert not problems
    text = page(f"a {EVIL}", parts, [f"problem {EVIL}"], [f"note {EVIL}"])
    own = text[: text.index("<script>")] + text[text.index("</script>") :]  # without plotly.js
    assert "alert(1)" in own and "<script>alert" not in own and "<img" not in own and "<b>" not in own
    assert own.count("<script") == sum(len(drawings(part.blocks)) for part in parts) + 1
    for part in parts:
        for drawing in drawings(part.blocks):
            plain = json.dumps(drawing.plain, allow_nan=False)
            assert "<script" not in plain and "<b>" not in plain and "<img" not in plain
            assert json.loads(str(embedded(drawing))) == json.loads(plain)


def test_the_page_asks_no_network_for_anything():
    text = page("t", [Section("Circuit", [circuit_graph("toy", CIRCUIT)])])
    assert "default-src 'none'" in text and "<link" not in text and " src=" not in text[: text.index("<script>")]
    assert "Plotly.newPlot" in text and len(text) > 1_000_000
    assert len(page("t", [Section("Nothing", [])])) < 20_000, "no plotly.js where nothing is drawn"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("months/evaluation.json", "cut", "evaluation.json is damaged or cut off"),
        ("months/circuit.json", "", "circuit.json is damaged or cut off"),
        ("roles/roles.json", "{}", "roles.json is no result of circuitkit"),
        ("transfer.json", '{"format_version": 1, "kind": "transfer", "checksum": "0"}', "its checksum does not match"),
        ("stability/stability.json", '{"format_version": 99}', "has format 99"),
        ("cross_task.json", b"\xff\xfe\x00", "cross_task.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_made(study, tmp_path, file, text, reason):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    path = folder / file
    path.write_bytes(path.read_bytes()[:200] if text == "cut" else text if isinstance(text, bytes) else text.encode())
    material = read(folder)
    (problem,) = material.problems
    assert file in problem and reason in problem and problem.endswith("left out.")
    assert sum(map(len, (material.circuits, material.scores, material.findings))) == 15, "the others are there"


def test_what_other_jobs_leave_beside_circuits_is_not_drawn_twice(study, tmp_path):
    """What a comparison found in all circuits, and the repeated searches of a stability study, have sections of their own."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    save(CIRCUIT, folder / "shared.json")
    save(CIRCUIT, folder / "stability" / "run 0" / "circuit.json")
    titles = [part.title for part in sections(read(folder))[0]]
    assert [title for title in titles if title.startswith("Circuit:")] == [f"Circuit: {task}" for task in sorted(TASKS)]


def test_a_map_of_some_nodes_has_the_shape_of_the_whole_model(study):
    parts, _ = sections(read(study))
    (stable,) = (part for part in parts if part.title == "Stability: stability")
    body = read(study).of_kind("evaluation")[0].what.body
    few = {**body, "removed_from_model": {"m0": {"value": 3.0}}}
    heat = named(FINDINGS["evaluation"][1]("toy", few, (4, 8)), "removed-from-model").figure.data[0]
    assert (len(heat.z), len(heat.z[0])) == (4, 9) and heat.z[0][8] == 3.0
    assert len(drawings(stable.blocks)) == 1


def test_a_finding_that_lacks_something_is_named_and_the_rest_is_made(study):
    material = read(study)
    broken = [{}, {"circuit": 3}, {"sites": None}, {"groups": {"a": 1}, "patterns": {"a0.h0": {"group": "b", "mean": [[1]]}}}]
    for number_, body in enumerate(broken):
        kind = list(FINDINGS)[number_]
        folder = study.parent / f"broken{number_}"
        save_finding(Finding(kind, "t", body), folder)
        (problem,) = read(folder).problems
        assert problem.startswith(f"{kind}.json is no whole result of the kind {kind!r}: its body") and problem.endswith("left out.")
    save_finding(Finding("something_new", "t", {}), study.parent / "new")
    assert "does not draw" in sections(read(study.parent / "new"))[1][0]
    assert material.problems == ()


def test_texts_where_numbers_belong_are_refused():
    body = cross_task("toy", ["a"], random.Random(0))
    body["percent"][0][0]["value"] = "<script>"
    with pytest.raises(TypeError, match="a number was expected"):
        FINDINGS["cross_task"][1]("toy", body)


def test_files_of_others_are_passed_by(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "circuit.json").write_text("not ours to read")
    (tmp_path / "previous-1").mkdir()
    (tmp_path / "previous-1" / "circuit.json").write_text("old")
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    save(CIRCUIT, tmp_path / "kept.json")
    material = read(tmp_path)
    assert [each.label for each in material.circuits] == ["kept"] and material.problems == () and material.findings == ()


def test_circuits_of_one_name_are_told_apart(tmp_path):
    for folder in ("a/months", "b/months"):
        save(CIRCUIT, tmp_path / folder / "circuit.json")
    assert [each.label for each in read(tmp_path).circuits] == ["a/months", "b/months"]


# What may be missing


def without(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # its import then fails


@pytest.mark.parametrize("name", ["plotly", "jinja2", "networkx"])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, name):
    without(monkeypatch, name)
    with pytest.raises(ConfigError, match=rf"needs the package {name}.*pip install circuitkit-nnsight\[report\]"):
        check_installed()


def test_without_kaleido_only_the_files_are_missing(monkeypatch, tmp_path):
    without(monkeypatch, "kaleido")
    files, reason = static.write_svgs([circuit_graph("toy", CIRCUIT)], tmp_path)
    assert files == [] and "pip install circuitkit-nnsight[report]" in reason and list(tmp_path.iterdir()) == []


def test_without_a_browser_only_the_files_are_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    files, reason = static.write_svgs([circuit_graph("toy", CIRCUIT)], tmp_path)
    assert files == [] and "apt-get install chromium" in reason and "The rest of the report was made" in reason
