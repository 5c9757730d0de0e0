"""Agents that know nothing of us: their requests, as they send them, name their program.

The shapes are those of public captures of the two command lines' traffic: header names and values,
and the fields of the body, with the text cut short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from autellix_sglang.identity import BodyIdentity, CallTag, HeaderIdentity

SESSION = "0198c7f0-5a2e-7c31-9d1b-3f5f2f6f9a10"


@dataclass(frozen=True)
class Shape:
    """One request of an agent's main loop."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


CLAUDE_CODE = Shape(
    "/v1/messages?beta=true",
    {
        "accept": "application/json",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "anthropic-dangerous-direct-browser-access": "true",
        "anthropic-version": "2023-06-01",
        "authorization": "Bearer none",
        "content-type": "application/json",
        "user-agent": "claude-cli/2.1.228 (external, cli)",
        "x-app": "cli",
        "X-Claude-Code-Session-Id": SESSION,
        "x-stainless-arch": "x64",
        "x-stainless-lang": "js",
        "x-stainless-os": "Linux",
        "x-stainless-retry-count": "0",
        "x-stainless-runtime": "node",
        "x-stainless-timeout": "600",
    },
    {
        "model": "m",
        "max_tokens": 4,
        "stream": True,
        "system": [{"type": "text", "text": "You are Claude Code."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "metadata": {"user_id": f"user_0_account__session_{SESSION}"},
    },
)
CODEX_BODY = {
    "model": "tiny-llama",
    "instructions": "You are Codex.",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    ],
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "store": False,
    "stream": True,
    "include": [],
    "prompt_cache_key": SESSION,
    "max_output_tokens": 4,
}
CODEX_HEADERS = {
    "accept": "text/event-stream",
    "authorization": "Bearer none",
    "content-type": "application/json",
    "originator": "codex_cli_rs",
    "user-agent": "codex_cli_rs/0.149.0 (Ubuntu 24.4.0; x86_64) xterm-256color",
    "version": "0.149.0",
}
CODEX = Shape(
    "/v1/responses",
    {
        **CODEX_HEADERS,
        "session-id": SESSION,
        "thread-id": SESSION,
        "x-client-request-id": SESSION,
        "x-codex-window-id": f"{SESSION}:0",
    },
    CODEX_BODY,
)
OLDER_CODEX = Shape(
    "/v1/responses",
    {
        **CODEX_HEADERS,
        "openai-beta": "responses=experimental",
        "conversation_id": SESSION,
        "session_id": SESSION,
    },
    CODEX_BODY,
)
SHAPES = pytest.mark.parametrize(
    "shape", [CLAUDE_CODE, CODEX, OLDER_CODEX], ids=["claude-code", "codex", "older-codex"]
)


@SHAPES
def test_an_agents_headers_name_its_session(shape: Shape) -> None:
    """The session is the program; none of the other headers is taken for an id."""
    header = HeaderIdentity.from_headers(shape.headers)
    tag = CallTag.resolve(header, BodyIdentity.from_body(), "rid")
    assert tag == CallTag(program_id=SESSION, call_id="rid")
