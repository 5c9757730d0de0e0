"""What coding agents send of themselves, in recorded shapes, to the real engine."""

from __future__ import annotations

import dataclasses
import json
import uuid

import pytest

from tests.client.test_agents import SESSION, SHAPES, Shape
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine


def of_session(shape: Shape, session: str) -> Shape:
    """The same request as another session of the agent sends it."""
    text = json.dumps(dataclasses.asdict(shape)).replace(SESSION, session)
    return Shape(**json.loads(text))


@SHAPES
def test_an_agents_session_is_a_program(engine: Engine, shape: Shape) -> None:
    """Two requests of a session are two calls of one program, and the stream's headers say so."""
    session = str(uuid.uuid4())
    request = of_session(shape, session)
    for _ in range(2):
        status, headers, events = engine.request(request.path, request.body, request.headers)
        assert status == 200, events
        assert headers["x-program-id"] == session
        assert "data: " in events
    status, _, program = engine.request(f"/v1/programs/{session}")
    assert (status, program["num_calls"], program["tenant"]) == (200, 2, "")
    assert len({call["id"] for call in program["calls"]}) == 2


@SHAPES
def test_two_sessions_are_two_programs(engine: Engine, shape: Shape) -> None:
    """Equal requests of different sessions have nothing to do with each other."""
    sessions = [str(uuid.uuid4()), str(uuid.uuid4())]
    for session in sessions:
        request = of_session(shape, session)
        assert engine.request(request.path, request.body, request.headers)[0] == 200
    for session in sessions:
        assert engine.request(f"/v1/programs/{session}")[2]["num_calls"] == 1
