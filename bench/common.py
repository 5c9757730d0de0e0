"""What every benchmark prints: progress on stderr, a table, and last one line of JSON.

The JSON line names the command, commit, hardware and versions, because a number without them
cannot be compared with another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PROGRESS_INTERVAL_S = 10.0

# --- what a number belongs to -------------------------------------------------------------------


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as a person would type it, `python -m bench.NAME ...`; files by their names."""
    argv = list(sys.argv if argv is None else argv)
    script = Path(argv[0])
    module = f"-m {script.parent.name}.{script.stem}" if script.suffix == ".py" else str(script)
    arguments = (Path(word).name if _is_place(word) else word for word in argv[1:])
    return " ".join(["python", module, *map(shlex.quote, arguments)])


def _is_place(word: str) -> bool:
    """Whether it says where somebody keeps a file."""
    return os.path.isabs(word) or os.path.isfile(word)  # noqa: PTH113, PTH117 - of any length


def commit() -> str | None:
    """The checked-out commit, `-dirty` if the tree differs from it; None outside a repository."""
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return None
    return f"{head}-dirty" if _output("git", "status", "--porcelain") else head


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, object]:
    """CPU model, usable cores, memory, and the GPUs if there are any."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    query = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    gpus = _output(*query)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpu": gpus.splitlines() if gpus else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a number depends on; None if not installed."""
    names = {"torch": "torch", "sglang": "sglang", "autellix_sglang": "autellix-sglang"}
    return {
        "python": platform.python_version(),
        **{key: _version(name) for key, name in names.items()},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def provenance(started: float, clock: Callable[[], float] = time.perf_counter) -> dict[str, object]:
    """The keys every result carries; `started` is `clock()` when the benchmark began."""
    return {
        "command": command_line(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "seconds": round(clock() - started, 1),
    }


def write_result(path: Path, text: str) -> None:
    """Write a file, its directory as well if need be, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def write_json(path: Path, result: Mapping[str, object]) -> None:
    write_result(path, json.dumps(result, indent=1) + "\n")


def print_result(result: Mapping[str, object], stream: IO[str] | None = None) -> None:
    """Print the last line of a benchmark: the result as one JSON object."""
    print(json.dumps(result, allow_nan=False), file=stream or sys.stdout, flush=True)


def new_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The command line of the benchmark `name`, whose module's docstring is its help."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def positive(text: str) -> float:
    """The type of an option that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def from_one(text: str) -> int:
    """The type of an option that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def run_benchmark(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    is_good: Callable[[dict[str, Any]], bool] = bool,
) -> int:
    """Parse, run, print the result as a table and, with its provenance, as the last line.

    Returns the exit status: 1 where the result is not good.
    """
    started = time.perf_counter()
    result = run(parser.parse_args(argv))
    print(table(result))
    print_result(result | provenance(started))
    return 0 if is_good(result) else 1


class CpuMeter:
    """Cores that processes other than ours kept busy since the meter was made.

    `pids` are the roots of our process trees. A benchmark on a shared machine has to say how much
    of it was really its own; stolen time of a virtual machine counts as others'.
    """

    def __init__(self, pids: Iterable[int], clock: Callable[[], float] = time.perf_counter) -> None:
        self._pids = tuple(pids)
        self._clock = clock
        self._start = (clock(), _busy_s(), self._own_s())

    def foreign_cores(self) -> float:
        """Mean number of cores used by others from the start until now."""
        wall, busy, own = self._start
        elapsed = max(self._clock() - wall, 1e-9)
        return max(0.0, (_busy_s() - busy) - (self._own_s() - own)) / elapsed

    def _own_s(self) -> float:
        # Trees may overlap (a server is a child of its benchmark); each process counts once.
        return sum({p: s for pid in self._pids for p, s in _tree_cpu_s(pid)}.values())


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.irq + times.softirq + times.steal)


def _tree_cpu_s(root: int) -> Iterator[tuple[int, float]]:
    """(pid, CPU seconds so far) of a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(root)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                yield process.pid, sum(process.cpu_times()[:2])


# --- tables -------------------------------------------------------------------------------------


def format_number(value: object, digits: int = 3) -> str:
    """A number to `digits` significant digits, without exponents; `-` for what is unknown."""
    if value is None:
        return "-"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their width: the first to the left, numbers to the right."""
    cells = [list(header), *([format_number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(_pad(row, widths)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = list(zip(row, widths, strict=True))
    return [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]


# --- progress -----------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line for the person watching; stdout is kept for results."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """How far a long step is: a bar on a terminal (or if `bar`), else a line every 10 s."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._clock = clock
        self._last_line = clock()
        show = sys.stderr.isatty() if bar is None else bar
        self._bar = _new_bar(label, total) if show else None

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._clock() - self._last_line >= PROGRESS_INTERVAL_S:
            self._last_line = self._clock()
            say(f"  {self._label}: {self._done} of {self._total}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _new_bar(label: str, total: int) -> Any:
    return tqdm(total=total, desc=label, unit="call", file=sys.stderr, leave=False)
