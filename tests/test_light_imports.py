"""What must import without an engine does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

BLOCKED = ("torch", "sglang", "zmq", "fastapi", "numpy")
STANDARD_LIBRARY_ONLY = (
    "autellix_sglang",
    "autellix_sglang.client",
    "autellix_sglang.config",
    "autellix_sglang.core.infer",
    "autellix_sglang.core.planner",
    "autellix_sglang.core.policy",
    "autellix_sglang.core.program",
    "autellix_sglang.core.queue",
    "autellix_sglang.errors",
    "autellix_sglang.identity",
    "autellix_sglang.router.balance",
    "autellix_sglang.router.config",
)
WITHOUT_ENGINE = (
    "autellix_sglang.engine.plugin",
    "autellix_sglang.engine.support",
    "autellix_sglang.launch",
    "autellix_sglang.messages",
    "autellix_sglang.router.fleet",
    "autellix_sglang.router.messages",
)
SCRIPT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = set(sys.argv[2].split(","))
sys.meta_path.insert(0, Blocker())
importlib.import_module(sys.argv[1])
"""


def import_alone(module: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Import a module in a fresh interpreter where some packages cannot be imported."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, module, ",".join(blocked)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_core_needs_the_standard_library_only(module):
    """The core and what it stands on import with every third-party package blocked."""
    done = import_alone(module, (*BLOCKED, "msgspec"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", WITHOUT_ENGINE)
def test_entry_points_import_without_an_engine(module):
    """What every spawned process imports needs neither torch nor SGLang nor a web framework."""
    done = import_alone(module, BLOCKED)
    assert (done.returncode, done.stderr) == (0, "")


def test_blocker_blocks():
    """The test's own blocker does stop a blocked import."""
    assert "msgspec is blocked" in import_alone("autellix_sglang.messages", ("msgspec",)).stderr


def test_a_light_install_brings_no_engine():
    """Without extras the package asks for msgspec alone; torch and SGLang come with an extra."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    asked = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert asked == {"msgspec"}
    assert {"cpu", "gpu"} <= project["optional-dependencies"].keys()
    assert "dynamic" not in project
