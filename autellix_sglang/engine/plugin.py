"""Puts program scheduling into SGLang's processes, and makes sure that it is there.

`register` is an entry point of the group `sglang.srt.plugins`, which SGLang runs in every process
of `sglang serve`; `autellix_sglang.launch` calls it by itself. It is active when `launch` left a
configuration in the environment, or when AUTELLIX_PROGRAM_POLICY names a policy (then
AUTELLIX_PROGRAM_LEVELS and so on are the other settings of `ProgramConfig`).

    HTTP process                                     scheduler processes
    ------------                                     -------------------
    launch_server               errors in one line
      _launch_subprocesses      checks the modes
        init_tokenizer_manager  ProgramTokenizerManager
        (spawn)                               ---->  run_scheduler_process: ProgramScheduler
        get_init_info                         <----  "program_scheduler"
                                checks them all
      _setup_and_run_http_server  routes, middleware, calibration

SGLang logs what a plugin raises and starts without it. So this module ends the process instead:
with an enabled configuration, a server runs with the program scheduler or not at all.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, NoReturn

from autellix_sglang import __version__
from autellix_sglang.config import ENV_VAR, OFF, ProgramConfig, flag_of, parse_setting
from autellix_sglang.core.kv import default_host_gib
from autellix_sglang.engine.support import check_supported, check_version
from autellix_sglang.errors import ActivationError, AutellixError, ConfigError
from autellix_sglang.router.config import WorkerConfig

ENV_PREFIX: Final = "AUTELLIX_PROGRAM_"
INFO_KEY: Final = "program_scheduler"  # in Scheduler.get_init_info()
HTTP_SERVER: Final = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"


def register() -> None:
    """Hook SGLang in this process if program scheduling is on; ends the process on any error."""
    try:
        config = config_from_environ(os.environ)
        if config.is_enabled:
            check_version()
            if _is_http_process():
                config = with_host_memory(config)
                _apply(_http_hooks())
            os.environ[ENV_VAR] = config.to_json()  # for the processes to come
        elif WorkerConfig.from_env() is not None and _is_http_process():
            _apply({HTTP_SERVER: _run_stock_http_server})
    except AutellixError as error:
        fail(error)
    except Exception as error:
        traceback.print_exc()
        fail(ActivationError(f"the program scheduler could not be put in place: {error}"))


def config_from_environ(environ: Mapping[str, str]) -> ProgramConfig:
    """The settings of this process: a launcher's, else the short form; raises `ConfigError`."""
    if environ.get(ENV_VAR):
        return ProgramConfig.from_env(environ)
    fields = {f.name: f for f in dataclasses.fields(ProgramConfig)}
    names = {key: key.removeprefix(ENV_PREFIX).lower() for key in environ if _is_short(key)}
    if not names or environ.get(ENV_PREFIX + "POLICY") == "":
        return ProgramConfig(policy=OFF)
    values: dict[str, Any] = {}
    for key, name in names.items():
        if name not in fields:
            raise ConfigError(key, f"unknown setting; there are {', '.join(fields)}")
        try:
            values[name] = parse_setting(name, environ[key])
        except ValueError:
            wanted = type(fields[name].default).__name__
            raise ConfigError(key, f"{environ[key]!r} is not of type {wanted}") from None
    if "policy" not in values:
        raise ConfigError(ENV_PREFIX + "POLICY", f"is not set, and {', '.join(names)} is")
    try:
        return ProgramConfig(**values)
    except ConfigError as error:
        keys = {flag_of(name): key for key, name in names.items()}
        raise ConfigError(keys[error.field], error.reason) from None


def with_host_memory(config: ProgramConfig, num_replicas: int = 1) -> ProgramConfig:
    """The settings with the host pool's size, decided here so that all ranks have the same.

    It is one engine's, where `num_replicas` of them share this machine.
    """
    if config.host_memory >= 0:
        return config
    from sglang.srt.mem_cache.host_memory import available_host_memory_bytes

    num_free = available_host_memory_bytes(allow_cgroup_fallback=True)  # within a container's limit
    share = default_host_gib(num_free, num_replicas)
    return config.replace(host_memory=share)


def _is_short(key: str) -> bool:
    return key.startswith(ENV_PREFIX)


def fail(error: AutellixError) -> NoReturn:
    """End the process with one line. SystemExit passes through SGLang's plugin loader."""
    print(f"autellix_sglang: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _is_http_process() -> bool:
    """Not in the children that SGLang spawns: the HTTP server's modules do not belong there."""
    is_child = multiprocessing.parent_process() is not None
    return not is_child or "sglang.srt.entrypoints.engine" in sys.modules


_hooked: set[str] = set()  # targets in this process


def _apply(hooks: Mapping[str, Any]) -> None:
    """Put SGLang's hooks in place, once; raises `ActivationError` unless all of them hold."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    originals = {target: _resolve(target) for target in hooks if target not in _hooked}
    for target in originals:
        kind = HookType.REPLACE if isinstance(hooks[target], type) else HookType.AROUND
        HookRegistry.register(target, hooks[target], kind)
    HookRegistry.apply_hooks()  # it logs what fails
    missing = [target for target, original in originals.items() if _resolve(target) is original]
    if missing:
        raise ActivationError(f"SGLang could not be hooked at {', '.join(missing)}")
    _hooked.update(originals)


def _resolve(target: str) -> Any:
    found = pkgutil.resolve_name(target)
    return getattr(found, "__func__", found)  # a class method is a new object at each look


# -- scheduler processes -------------------------------------------------------------------------


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """Target of the scheduler processes: SGLang's own, with our class in place of `Scheduler`."""
    from sglang.srt.managers import scheduler
    from sglang.srt.managers.io_struct import hook_custom_types

    from autellix_sglang.engine.scheduler import ProgramScheduler
    from autellix_sglang.messages import MESSAGES

    hook_custom_types(*MESSAGES)
    _apply({SCHEDULER: ProgramScheduler})
    assert scheduler.Scheduler is ProgramScheduler
    scheduler.run_scheduler_process(*args, **kwargs)


# -- HTTP process --------------------------------------------------------------------------------


def _http_hooks() -> dict[str, Callable[..., Any]]:
    return {
        "sglang.srt.entrypoints.http_server.launch_server": _launch_server,
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": _launch_subprocesses,
        HTTP_SERVER: _run_http_server,
    }


def _launch_server(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return original(*args, **kwargs)
    except AutellixError as error:
        fail(error)


def _launch_subprocesses(original: Callable[..., Any], engine: Any, **kwargs: Any) -> Any:
    """Around the start of all processes, of a server or of an offline `Engine`."""
    from autellix_sglang.engine.tokenizer import ProgramTokenizerManager

    check_supported(kwargs["server_args"])
    kwargs["run_scheduler_process_func"] = run_scheduler_process
    kwargs["init_tokenizer_manager_func"] = partial(
        kwargs["init_tokenizer_manager_func"], TokenizerManagerClass=ProgramTokenizerManager
    )
    result = original(engine, **kwargs)
    check_activation(result[0], result[3].scheduler_infos)
    return result


def check_activation(tokenizer_manager: Any, scheduler_infos: Iterable[Mapping[str, Any]]) -> None:
    """Raise `ActivationError` unless every process of this server runs our classes."""
    policy = ProgramConfig.from_env().policy
    expected = {"version": __version__, "policy": policy}
    found = [info.get(INFO_KEY) for info in scheduler_infos]
    if not found or any(info != expected for info in found):
        raise ActivationError(
            f"a scheduler process came up as {found}, not as {expected}; "
            "start with `python -m autellix_sglang.launch` or `sglang serve`"
        )
    from autellix_sglang.engine.tokenizer import ProgramTokenizerManager

    if not isinstance(tokenizer_manager, ProgramTokenizerManager):
        raise ActivationError(f"{type(tokenizer_manager).__name__} would not tag any call")


def _run_http_server(
    original: Callable[..., Any],
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around the HTTP server: its app is complete and has not started."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.runtime_context import get_serving

    from autellix_sglang.engine import http

    check_activation(tokenizer_manager, scheduler_infos)
    serving = get_serving()
    keys = http.ApiKeys(serving.api_key, serving.admin_api_key)
    http.install(app, tokenizer_manager.program_control, keys)
    app.router.lifespan_context = _lifespan(app.router.lifespan_context, tokenizer_manager)
    _join_routers(tokenizer_manager)
    for name in ("execute_warmup_func", "launch_callback"):
        kwargs[name] = partial(_calibrate_first, kwargs.get(name), tokenizer_manager)
    return original(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        scheduler_infos,
        *args,
        **kwargs,
    )


def _run_stock_http_server(
    original: Callable[..., Any], server_args: Any, manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around the HTTP server of a replica with policy `off`: all it gets is the worker agent."""
    _join_routers(manager)
    return original(server_args, manager, *args, **kwargs)


def _join_routers(manager: Any) -> None:
    """Let this replica work for the routers it was told of, if any."""
    config = WorkerConfig.from_env()
    if config is not None:
        from sglang.srt.entrypoints.http_server import app
        from sglang.srt.runtime_context import get_serving

        from autellix_sglang.engine import worker

        serving = get_serving()
        worker.attach(app, manager, config, f"http://{serving.host}:{serving.port}")


def _lifespan(original: Callable[[Any], AbstractAsyncContextManager[Any]], manager: Any) -> Any:
    """SGLang's lifespan, with the tokenizer manager's event loop known before the warm-up."""

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        manager.auto_create_handle_loop()
        async with original(app) as state:
            yield state

    return lifespan


def _calibrate_first(then: Callable[..., Any] | None, manager: Any, *args: Any) -> Any:
    """Before SGLang's warm-up, in its thread: the server still calls itself unready.

    And once more before the launch callback, for servers that skip the warm-up.
    """
    manager.calibrate_once_from_thread()
    return None if then is None else then(*args)
