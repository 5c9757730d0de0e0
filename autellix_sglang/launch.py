"""`python -m autellix_sglang.launch`: an SGLang server that schedules programs.

Takes our own flags and every flag of SGLang. The processes that SGLang spawns import this module
again as their `__main__`, so it imports nothing heavy before `main` runs.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from autellix_sglang import __version__, platform
from autellix_sglang.config import ENV_VAR, ProgramConfig, add_arguments, flag_of, from_arguments
from autellix_sglang.engine.support import (
    check_installed,
    check_supported,
    check_version,
    installed_version,
)
from autellix_sglang.errors import AutellixError, ConfigError, PortInUseError
from autellix_sglang.patches import torchvision_ops
from autellix_sglang.router.config import (
    WORKER_ENV_VAR,
    add_fleet_arguments,
    add_worker_arguments,
    check_port_number,
    worker_from_arguments,
)
from autellix_sglang.router.config import flag_of as sglang_flag_of

logger = logging.getLogger("autellix_sglang")

MODEL_FLAGS: Final = ("--model-path", "--model")
LOG_FORMAT: Final = "[%(asctime)s] %(message)s"  # SGLang's

torchvision_ops.install()  # in this process and, by re-import, in those it spawns


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; returns the exit status.

    That is 2 for anything wrong with the arguments, and 75 where only the port is taken.
    """
    try:
        argv = _with_config_apart(sys.argv[1:] if argv is None else argv)
        namespace, sglang_argv = parse(argv)
        if namespace.help_sglang:
            return _print_sglang_help()
        if namespace.replicas:
            return serve_replicas(namespace, sglang_argv, argv)
        worker = worker_from_arguments(namespace)
        if worker is not None:
            os.environ[WORKER_ENV_VAR] = worker.to_json()
        return serve(from_arguments(namespace), sglang_argv)
    except AutellixError as error:
        _report(error)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our flags and SGLang's, which are left as they are."""
    parser = _Parser(
        prog="python -m autellix_sglang.launch",
        usage="%(prog)s [our flags] [any flag of `sglang serve` ...]",
        description="Serve a model with SGLang, scheduling agent programs instead of requests. "
        "All flags of `sglang serve` are accepted and mean what they mean there (see "
        "--help-sglang). Without --model-path a tiny built-in model is served.",
        allow_abbrev=False,
    )
    parser.add_argument("--help-sglang", action="store_true", help="show SGLang's flags and exit")
    parser.add_argument("--version", action="version", version=_versions())
    add_arguments(parser)
    add_fleet_arguments(parser)
    add_worker_arguments(parser)
    return parser.parse_known_args(argv)


def serve(config: ProgramConfig, sglang_argv: list[str]) -> int:
    """Run SGLang with these settings until it stops."""
    check_installed()
    # Read by the processes SGLang spawns; `off` also silences our plugin there.
    os.environ[ENV_VAR] = config.to_json()
    server_args = prepare(config, sglang_argv)
    signal.signal(signal.SIGTERM, _exit_on_signal)  # until SGLang's own handler takes over

    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import kill_process_tree

    from autellix_sglang.engine import plugin

    try:
        plugin.register()
        load_plugins()
        from sglang.launch_server import run_server

        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def serve_replicas(
    namespace: argparse.Namespace, sglang_argv: list[str], argv: Sequence[str]
) -> int:
    """Run several replicas behind a router until stopped; this process loads no model."""
    if namespace.replicas < 1:
        raise ConfigError("--replicas", f"{namespace.replicas} is not allowed; it must be above 0")
    config = from_arguments(namespace)  # refuse now what every replica would refuse

    from autellix_sglang.engine import plugin
    from autellix_sglang.router import fleet

    if config.is_enabled and config.host_memory < 0:  # each would take what is there for all
        share = plugin.with_host_memory(config, namespace.replicas).host_memory
        argv = [*argv, flag_of("host_memory"), str(share)]

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    settings = config_file(sglang_argv).items()
    of_file = [part for key, value in settings for part in (sglang_flag_of(key), str(value))]
    return fleet.serve(namespace, [*of_file, *sglang_argv], argv)


def prepare(config: ProgramConfig, sglang_argv: list[str]) -> Any:
    """SGLang's server arguments, with defaults that make a bare command line work.

    Raises `ConfigError` for a value that SGLang refuses and for a mode that we cannot honour, and
    `ActivationError` for another SGLang than the one that we hook.
    """
    if config.is_enabled:
        check_version()
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    given = given_flags(sglang_argv)
    if platform.has_unusable_gpu():
        if "--device" not in given:
            raise ConfigError(
                "--device",
                "PyTorch cannot use this machine's NVIDIA GPU, whose driver may be too old for it "
                "(compare nvidia-smi); --device cpu serves on the CPU",
            )
        os.environ.setdefault(platform.ENV_SWITCH, "1")  # for the processes to come
    if "--config" not in given:
        parser = _Parser(prog="sglang", add_help=False)  # SGLang's own prints every flag it has
        ServerArgs.add_cli_args(parser)
        parser.parse_args(["--model-path=", *sglang_argv])
    try:
        server_args = prepare_server_args([*sglang_argv, *_default_flags(given)])
        if server_args.device == "cpu":
            server_args.base_gpu_id = _first_cpu_node(server_args)
        if config.is_enabled:
            check_supported(server_args)
            check_port(server_args.host, server_args.port)
            server_args.resolve_once()  # reads the model's configuration
    except (ValueError, OSError) as error:
        raise ConfigError("SGLang", str(error)) from error
    return server_args


def _first_cpu_node(server_args: Any) -> int:
    """Where SGLang's ranks begin on a CPU: it takes GPU numbers for groups of cores there.

    A replica's number may exceed how many groups there are; replicas then share them.
    """
    from sglang.srt.utils import get_cpu_ids_by_node

    bound = os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all")
    num_nodes = len(get_cpu_ids_by_node()) if bound == "all" else bound.count("|") + 1
    first = int(server_args.base_gpu_id) % num_nodes
    num_ranks = server_args.tp_size * server_args.pp_size
    return first if first + num_ranks <= num_nodes else 0


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if it cannot be served on: SGLang would find out minutes later."""
    check_port_number(port)
    try:
        socket.create_server((host, port), family=_family_of(host)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError("--port", f"{port} on {host} is in use") from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES):
            raise ConfigError("--port", f"{port} on {host}: {error.strerror}") from error


def _family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def given_flags(sglang_argv: Iterable[str]) -> frozenset[str]:
    """The flags on the command line or in the file named by --config."""
    argv = list(sglang_argv)
    given = {arg.partition("=")[0] for arg in argv if arg.startswith("--")}
    return frozenset(given.union(map(sglang_flag_of, config_file(argv))))


def config_file(sglang_argv: Sequence[str]) -> dict[str, Any]:
    """What the file named by --config says, by its keys; raises `ConfigError`."""
    if "--config" not in sglang_argv[:-1]:
        return {}
    import yaml

    path = sglang_argv[sglang_argv.index("--config") + 1]
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(error)) from error
    if not isinstance(settings, dict | None):
        raise ConfigError("--config", f"{path} holds no mapping of flags to values")
    return {str(key): value for key, value in (settings or {}).items()}


def _with_config_apart(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as two words: SGLang passes over it as one."""
    pairs = (arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in argv)
    return [part for pair in pairs for part in pair]


def _default_flags(given: frozenset[str]) -> list[str]:
    flags: dict[str, str] = {}
    if not given.intersection(MODEL_FLAGS):
        flags |= _builtin_model_flags()
    if not platform.has_accelerator():
        flags |= {"--device": "cpu", "--attention-backend": "torch_native"}
    missing = {flag: value for flag, value in flags.items() if flag not in given}
    return [part for item in missing.items() for part in item]


def _builtin_model_flags() -> dict[str, str]:
    from autellix_sglang.platform.tiny_model import ensure_tiny_model

    path = str(ensure_tiny_model())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    logger.warning("no --model-path: serving the built-in tiny model with random weights, %s", path)
    # Float32 has no ties that depend on the batch; the attention kernels of GPUs refuse it.
    dtype = "bfloat16" if platform.has_accelerator() else "float32"
    return {"--model-path": path, "--dtype": dtype, "--served-model-name": "tiny-llama"}


class _Parser(argparse.ArgumentParser):
    """Reports a bad value in one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_report(message))


def _report(error: object) -> int:
    text = " ".join(str(error).split())
    print(f"autellix_sglang: error: {text}", file=sys.stderr, flush=True)
    return 2


def _versions() -> str:
    return f"autellix_sglang {__version__} (sglang {installed_version() or 'is not installed'})"


def _print_sglang_help() -> int:
    from sglang.srt.server_args import prepare_server_args

    prepare_server_args(["--help"])
    return 0


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
