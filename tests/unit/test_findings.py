"""Findings: what each kind holds is declared once, and a file that holds something else is refused with the place."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any, TypedDict, get_type_hints

import pytest
import study_for_tests as study

from circuitkit.core import plain
from circuitkit.core.bodies import BODIES
from circuitkit.core.circuit import Circuit
from circuitkit.core.errors import CircuitError
from circuitkit.core.findings import Finding
from circuitkit.core.node import Node
from circuitkit.report.contents import FINDINGS

CIRCUIT = Circuit(tuple(map(Node.parse, ("a0.h1", "m0", "a1.h0", "m1"))), 2, 2, "toy", 80.5)


def bodies() -> dict[str, dict[str, Any]]:
    """A body of every kind."""
    drawing = random.Random(0)
    return {
        "evaluation": study.evaluation("toy", CIRCUIT, drawing),
        "edges": study.edges("toy", CIRCUIT, drawing),
        "compare": study.compare({"a": "first", "b": "second"}, {"a": CIRCUIT, "b": CIRCUIT}),
        "cross_task": study.cross_task("toy", ["a", "b"], drawing),
        "stability": study.stability("toy", "toy", CIRCUIT, drawing),
        "roles": study.roles("toy", CIRCUIT, drawing),
        "transfer": study.transfer("toy", CIRCUIT, drawing),
    }


def read(kind: str, body: Any) -> Finding[Any]:
    return Finding.from_json(Finding(kind, "t", body).to_json(), "a.json")


def test_every_kind_is_declared_drawn_and_tried_here():
    assert set(BODIES) == set(FINDINGS) == set(bodies())


@pytest.mark.parametrize("kind", BODIES)
def test_a_whole_body_comes_back_as_it_was(kind):
    body = bodies()[kind]
    assert read(kind, body).body == body


@pytest.mark.parametrize("kind", BODIES)
def test_each_entry_is_needed(kind):
    for key in BODIES[kind].__required_keys__:
        body = bodies()[kind]
        del body[key]
        with pytest.raises(CircuitError, match=f"^a.json is no whole result of the kind '{kind}': its body has no '{key}'. Make it again"):
            read(kind, body)


@pytest.mark.parametrize("kind", BODIES)
def test_no_entry_can_be_of_another_type(kind):
    for key in get_type_hints(BODIES[kind]).keys() & bodies()[kind].keys():
        with pytest.raises(CircuitError, match=rf"its body\['{key}'\]"):
            read(kind, bodies()[kind] | {key: [[[0]]]})  # what none is


@pytest.mark.parametrize(
    ("kind", "place", "value", "sentence"),
    [
        ("evaluation", ("score", "low"), "4", "its body['score']['low'] is '4', expected a number or null"),
        ("evaluation", ("score", "value"), None, "its body['score']['value'] is None, expected a number"),
        ("evaluation", ("n_prompts",), 2.0, "its body['n_prompts'] is 2.0, expected a whole number"),
        ("evaluation", ("n_prompts",), True, "its body['n_prompts'] is True, expected a whole number"),
        ("evaluation", ("prompts", 3, "group"), 3, "its body['prompts'][3]['group'] is 3, expected a text"),
        ("transfer", ("mlps",), 1, "its body['mlps'] is 1, expected true or false"),
        ("compare", ("pairs", 0), [], "its body['pairs'][0] is [], expected a mapping"),
        ("roles", ("ov", "copy"), None, "its body['ov']['copy'] is None, expected a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(kind, place, value, sentence):
    body = deepcopy(bodies()[kind])
    holder: Any = body
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(CircuitError) as caught:
        read(kind, body)
    assert f": {sentence}. Make it again" in str(caught.value)


def test_a_part_that_is_not_always_there_is_checked_where_it_is():
    body = bodies()["roles"]
    del body["ov"]
    assert "ov" not in read("roles", body).body
    with pytest.raises(CircuitError, match=r"its body\['ov'\] has no 'copy'"):
        read("roles", body | {"ov": {}})


def test_more_than_is_declared_and_other_kinds_may_be_of_a_later_version():
    assert read("edges", bodies()["edges"] | {"later": 1}).body["later"] == 1
    assert read("later", {"anything": [1]}).body == {"anything": [1]}


def test_a_whole_number_is_a_number():
    class Held(TypedDict):
        share: float

    assert plain.misfit({"share": 1}, Held, "it") is None
    assert plain.misfit({"share": True}, Held, "it") == "it['share'] is True, expected a number"
    assert plain.misfit([1, "a"], list[int | str], "it") is None
    assert plain.misfit([1, 2.5], list[int | str], "it") == "it[1] is 2.5, expected a whole number or a text"
