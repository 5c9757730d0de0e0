"""Starting, watching and stopping server processes, with a small stand-in server."""

import sys
import time
from pathlib import Path

import pytest

from bench import server
from bench.server import Server, ServerError

# Answers /health after a moment; POST /flush_cache refuses once. A child of its own shows that
# the whole group is stopped.
SCRIPT = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
refusals = [400]

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body=b"{}"):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, b'{"max_running_requests": 7}')

    def do_POST(self):
        self.answer(refusals.pop() if refusals else 200)

    def do_PATCH(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        print("patched", self.path, body, flush=True)
        self.answer(400 if "nonsense" in body else 200)

    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def make(tmp_path, script: str) -> Server:
    port = server.free_port()
    return Server("fake", [sys.executable, "-c", script, str(port)], port, tmp_path)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_ready_answers_and_is_stopped_with_all_its_children(tmp_path):
    """Inside the block the server answers; after it nothing of its process group is left."""
    with make(tmp_path, SCRIPT) as fake:
        pid = fake.pid
        child = int(fake.log_path.read_text().split()[1])
        assert server.server_info(fake.base_url) == {"max_running_requests": 7}
        assert is_alive(child)

    assert not is_alive(pid)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_busy_server_is_asked_again_to_flush_its_cache(tmp_path):
    """SGLang refuses to flush while calls are being cleaned up; flushing waits for it."""
    with make(tmp_path, SCRIPT) as fake:
        server.flush_cache(fake.base_url, sleep=lambda _: None)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    """The error of a failed start names the command and quotes the log."""
    with (
        pytest.raises(ServerError, match=r"(?s)'fake'.*status 3.*no such flag"),
        make(tmp_path, "import sys; print('no such flag'); sys.exit(3)"),
    ):
        pass


def test_a_server_that_is_never_ready_is_stopped(tmp_path):
    """A server that does not answer in time is an error, and is not left running."""
    fake = make(tmp_path, "import time; time.sleep(600)")
    fake.start()
    pid = fake.pid

    with pytest.raises(ServerError, match="not ready after 0 s"):
        fake.wait_ready(timeout_s=0.0)
    fake.stop()

    assert not is_alive(pid)


def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path):
    """After the grace period what is left of the group is killed."""
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); time.sleep(600)"
    )
    fake = make(tmp_path, script)
    fake.start()
    pid = fake.pid
    while "deaf" not in fake.log_path.read_text():
        time.sleep(0.02)

    fake.stop(timeout_s=0.3)

    assert not is_alive(pid)


def test_nobody_there_is_a_server_error():
    """Asking a server that does not exist fails with its address."""
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/server_info"):
        server.server_info("http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/flush_cache"):
        server.flush_cache("http://127.0.0.1:9")


def test_servers_differ_only_in_policy_and_port():
    """Every policy is served with the same flags, the caller's last."""
    commands = [
        server.launch_command(p, port, ["--x", "1"]) for p, port in (("off", 1), ("plas", 2))
    ]
    differing = [(a, b) for a, b in zip(*commands, strict=True) if a != b]

    assert differing == [("off", "plas"), ("1", "2")]
    assert commands[0][-2:] == ["--x", "1"]
    assert Path(commands[0][0]).name.startswith("python")


def test_stock_orders_are_sglang_flags_with_our_scheduler_off():
    """`lpm` and `hrrn` are SGLang's own; the program policy is off for them."""
    command = server.launch_command("hrrn", 1)

    assert command[command.index("--program-policy") + 1] == "off"
    assert command[command.index("--schedule-policy") + 1] == "hrrn"


def test_our_policies_share_one_server_and_are_selected_on_it(monkeypatch):
    """Four policies need two servers: stock SGLang's own, and one switched between ours."""
    launched = []

    def launch(policy, port, flags):
        launched.append(policy)
        return [sys.executable, "-c", SCRIPT, str(port)]

    monkeypatch.setattr(server, "launch_command", launch)

    with server.policy_servers(["off", "mlfq", "plas"]) as endpoints:
        for endpoint in endpoints.values():
            endpoint.select()
        off, mlfq, plas = endpoints.values()
        assert plas.server is mlfq.server
        assert mlfq.base_url == plas.base_url != off.base_url
        assert "patched" not in off.server.log_path.read_text()
        assert plas.server.log_path.read_text().split("\n")[1:3] == [
            'patched /program_config {"policy": "mlfq"}',
            'patched /program_config {"policy": "plas"}',
        ]
        with pytest.raises(ServerError, match="nonsense"):
            server.configure(plas.base_url, policy="nonsense")

    assert launched == ["off", "mlfq"]


def test_a_policy_alone_on_its_server_is_not_switched(monkeypatch):
    """A server started with its only policy is left as it is, stock or ours."""
    monkeypatch.setattr(
        server, "launch_command", lambda _, port, __: [sys.executable, "-c", SCRIPT, str(port)]
    )

    with server.policy_servers(["lpm", "plas"]) as endpoints:
        for endpoint in endpoints.values():
            endpoint.select()
            assert "patched" not in endpoint.server.log_path.read_text()
