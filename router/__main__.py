"""`python -m autellix_sglang.router`: the front door on its own.

Workers join it with `python -m autellix_sglang.launch --router-endpoint ...`, on any machine.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autellix_sglang.errors import AutellixError, ConfigError
from autellix_sglang.router.config import (
    RouterConfig,
    add_arguments,
    check_endpoint,
    from_arguments,
)

if TYPE_CHECKING:
    from autellix_sglang.router.app import Service
    from autellix_sglang.router.hub import Hub

LOG_FORMAT = "[%(asctime)s] %(message)s"  # SGLang's
KEEP_ALIVE_S = 75  # longer than clients keep idle connections: they never send into a closed one


def main(argv: Sequence[str] | None = None) -> int:
    """Route until stopped; returns the exit status, 2 for anything wrong with the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m autellix_sglang.router", description=__doc__, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--make-keys", metavar="DIR", help="write CURVE keys there and exit")
    namespace = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    try:
        if namespace.make_keys:
            from autellix_sglang.router.channel import make_keys

            make_keys(namespace.make_keys)
            return 0
        config = from_arguments(namespace)
        is_safe = bool(config.keys) or config.insecure
        check_endpoint("--endpoint", config.endpoint, is_safe=is_safe)

        from autellix_sglang.router.hub import Hub

        return serve(Hub(config))
    except AutellixError as error:
        print(f"autellix_sglang: error: {error}", file=sys.stderr, flush=True)
        return 2


def listen(config: RouterConfig) -> socket.socket:
    """The socket that clients connect to; raises `ConfigError` where it cannot be had.

    Linux would let an answer that nobody reads fill megabytes of kernel memory. What a stream
    holds there is bounded like what it holds elsewhere; accepted connections inherit it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        made = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError("--port", f"{config.host}:{config.port}: {error.strerror}") from error
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.credit_bytes)
    return made


def serve(hub: Hub, fleet: Service | None = None) -> int:
    """Run the router until a signal stops it; calls that run get `stop_s` seconds to end.

    Raises `ConfigError` if the port is taken.
    """
    import uvicorn

    from autellix_sglang.router.app import RouterApp

    config = hub.config
    listener = listen(config)
    server = uvicorn.Server(
        uvicorn.Config(
            RouterApp(hub, fleet),
            access_log=False,
            log_level="warning",
            lifespan="on",
            proxy_headers=False,  # who is on this machine may drain: no header shall claim that
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(config.stop_s)),
        )
    )
    logging.getLogger(__name__).info(
        "routing http://%s:%d to workers that dial %s, policy %s",
        config.host, config.port, config.endpoint, config.policy,
    )  # fmt: skip
    # uvicorn stops in good order and then raises the signal again, for whoever listens: nobody.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has stopped by then
        return 128 + signal.SIGINT
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
