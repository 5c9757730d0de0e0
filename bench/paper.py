"""Does the paper hold? Its figures, simulated with the server's own scheduler, beside its numbers.

    make paper                                  # all figures: 20 minutes of two cores at most
    python -m bench.paper --quick               # all figures, small: within a minute
    python -m bench.paper --figures 2,12 --resume

One A100 80GB with Llama-3.1-8B, simulated (`bench.sim_engine`, `bench.sim_device`), programs drawn
from the statistics that the paper publishes (`bench.synthetic`), the server's own process table,
policies and planner. The result is one page, `bench/out/paper.html`: per figure what it asks, our
answer in a sentence made from the data, plots, a table ours / the paper's / SRPT, and whether they
agree; before them, how far the simulator is from the live engine (`bench.sim_validate`), and after
them what the paper does not show. `bench.paper_runs` holds what is simulated, `paper_base`,
`paper_engine`, `paper_rates`, `paper_fleet`, `paper_costs`, `paper_orders` and `paper_validation`
what is said of it.

Finished simulations are kept in `bench/out/`; with `--resume` those of the same size are used
again, if no source file of the simulator has changed. But for one measured time in Fig. 17 the
numbers repeat exactly. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, Final

from bench import (
    paper_costs,
    paper_engine,
    paper_fleet,
    paper_orders,
    paper_rates,
    paper_validation,
    report,
)
from bench.common import (
    ROOT,
    Progress,
    new_parser,
    print_result,
    provenance,
    say,
    write_json,
    write_result,
)
from bench.paper_base import (
    FULL,
    OURS,
    QUICK,
    VERDICTS,
    Figure,
    Findings,
    Results,
    Size,
    colour_of,
    name_of,
)
from bench.paper_runs import Cell, Result

FIGURES: Final = {
    figure.number: figure
    for figure in sorted(
        (
            *paper_engine.FIGURES,
            *paper_rates.FIGURES,
            *paper_fleet.FIGURES,
            *paper_costs.FIGURES,
            *paper_orders.FIGURES,
        ),
        key=lambda figure: (
            not figure.number.isdigit(),
            figure in paper_orders.FIGURES,
            figure.number.zfill(2),
        ),
    )
}
OUT: Final = ROOT / "bench" / "out"
SIMULATED_BY: Final = (
    "autellix_sglang/config.py",
    "autellix_sglang/core/*.py",
    "autellix_sglang/testing.py",
    "bench/paper_runs.py",
    "bench/planner.py",
    "bench/replay.py",
    "bench/sim*.py",
    "bench/stats.py",
    "bench/synthetic.py",
    "bench/trace.py",
    "router/balance.py",
)
VERDICT_CLASSES: Final = {verdict: verdict.split()[0] for verdict in VERDICTS}

# --- simulating ---------------------------------------------------------------------------------


def fingerprint(size: Size) -> str:
    """A name for what decides the results: the simulator's sources and the size."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(size)).encode())
    for path in sorted(path for pattern in SIMULATED_BY for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """Results of finished cells, one JSON line each: a run that is cut off loses nothing."""

    def __init__(self, path: Path, version: str, *, is_resumed: bool) -> None:
        self._path = path
        self._version = version
        self.known: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_resumed and path.exists():
            self.known = dict(self._lines())
        else:
            path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[tuple[str, Result]]:
        for line in self._path.read_text().splitlines():
            entry = json.loads(line)
            if entry["version"] == self._version:
                yield entry["cell"], entry["result"]

    def add(self, cell: Cell, result: Result) -> None:
        self.known[cell.key] = result
        entry = {"version": self._version, "cell": cell.key, "result": result}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def run_cells(cells: Sequence[Cell], store: Store, num_processes: int) -> dict[Cell, Result]:
    """The result of every cell, simulated unless it is in the store."""
    missing = [cell for cell in dict.fromkeys(cells) if cell.key not in store.known]
    say(f"{len(missing)} simulations to do, {len(set(cells)) - len(missing)} done before")
    with Progress("simulations", len(missing)) as progress:
        for cell, result in _computed(missing, num_processes):
            store.add(cell, result)
            progress.advance()
    return {cell: store.known[cell.key] for cell in cells}


def _computed(cells: Sequence[Cell], num_processes: int) -> Iterator[tuple[Cell, Result]]:
    if num_processes == 1:
        yield from ((cell, cell.compute()) for cell in cells)
        return
    with _pool(num_processes) as pool:
        waiting = {pool.submit(cell.compute): cell for cell in cells}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


@contextmanager
def _pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- the page -----------------------------------------------------------------------------------

INTRO: Final = (
    "Autellix schedules <em>programs</em> instead of requests. What follows takes its figures one"
    " by one and asks whether they hold for this implementation: the scheduler that serves real"
    " traffic, on a simulated A100, with programs drawn from the statistics that the paper gives."
    " The paper publishes neither its batch size, nor its queue bounds, nor its quanta. So read its"
    " factors as directions, and ours as what our defaults do."
)


SMALL: Final = "A small run: it shows that everything works. What is true, `make paper` says."


def render(found: Sequence[tuple[Figure, Findings]], result: dict[str, Any]) -> str:
    """The whole report as one document."""
    counts = {v: sum(f.verdict == v for _, f in found) for v in VERDICTS}
    tiles = "".join(
        f'<div class="tile"><b>{count}</b><span>{escape(verdict)}</span></div>'
        for verdict, count in counts.items()
        if count
    )
    title = f"The paper's figures, <b>{len(found)}</b> of them run again"
    contents = " \N{MIDDLE DOT} ".join(
        f'<a href="#fig-{figure.number}">{escape(_label(figure))}</a>' for figure, _ in found
    )
    note = f'<p class="note">{SMALL}</p>' if result["size"] == dataclasses.asdict(QUICK) else ""
    header = (
        '<header><p class="kicker">Autellix, arXiv 2502.13965, against autellix_sglang</p>'
        f'<h1>{title}</h1><div class="tiles">{tiles}</div><p>{INTRO}</p>'
        f'<p class="caption">{contents}</p>{note}</header>'
    )
    method = report.section("How this was made", "method", report.definitions(_facts(result)))
    validation = paper_validation.section(paper_validation.load_results())
    body = header + validation + "".join(_figure_section(*each) for each in found) + method
    return report.page("The figures of Autellix, run again", body)


def _label(figure: Figure) -> str:
    if figure.number.isdigit():
        return f"Fig. {figure.number}"
    return figure.number.capitalize() if figure in paper_orders.FIGURES else figure.number.upper()


def _figure_section(figure: Figure, found: Findings) -> str:
    verdict = (
        f'<span class="verdict {VERDICT_CLASSES[found.verdict]}">{escape(found.verdict)}</span>'
    )
    heading = f"{escape(_label(figure))}: {escape(figure.title)}{verdict}"
    keys = [*((colour_of(p), name_of(p)) for p in found.policies), *found.keys]
    return report.section(
        heading,
        f"fig-{figure.number}",
        f'<p class="question">{escape(figure.question)}</p>'
        f'<p class="answer">{escape(found.answer)}</p>'
        + (report.legend(keys) if keys else "")
        + f'<div class="panels">{_panels(found.charts)}</div>'
        + report.table(found.header, found.rows)
        + report.caption(escape(found.remark)),
    )


def _panels(drawn: Sequence[str]) -> str:
    """Charts side by side; a narrow one that is alone keeps its size."""
    known = [chart for chart in drawn if chart]
    is_alone = len(known) == 1 and 'viewBox="0 0 470 ' in known[0]
    return "".join([*known, "<div></div>"] if is_alone else known)


def _facts(result: dict[str, Any]) -> dict[str, object]:
    return {
        "device": "A100 80GB with Llama-3.1-8B (70B on four), a roofline of data sheets",
        "ours": f"the default policy, {OURS}, and the attained-service policies plas and atlas",
        "srpt": "clairvoyant: least remaining work of the program first, preemptive; the bound",
        "size": json.dumps(result["size"]),
        **report.provenance_facts(result),
    }


# --- command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = new_parser("bench.paper", __doc__)
    add = out.add_argument
    add("--quick", action="store_true", help="few programs: shows that it works, not what is true")
    add("--figures", type=_figures, default=tuple(FIGURES), metavar="F,F",
        help=f"of {', '.join(FIGURES)} (default: all)")  # fmt: skip
    add("--processes", type=int, choices=(1, 2), default=2, help="default: %(default)s")
    add("--resume", action="store_true", help="use simulations that an earlier run has finished")
    add("--html", type=Path, default=OUT / "paper.html", help="default: bench/out/paper.html")
    add("--json", type=Path, help="write the result there, too")
    return out


def _figures(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in FIGURES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown figure {', '.join(unknown)}; there are {', '.join(FIGURES)}"
        )
    return names


def reproduce(
    names: Iterable[str], size: Size, store: Store, num_processes: int
) -> list[tuple[Figure, Findings]]:
    """Simulate what the figures need, and draw them."""
    figures = [FIGURES[name] for name in names]
    cells = [cell for figure in figures for cell in figure.cells(size)]
    results: Results = run_cells(cells, store, num_processes)
    return [(figure, figure.find(size, results)) for figure in figures]


def as_json(found: Sequence[tuple[Figure, Findings]]) -> dict[str, Any]:
    return {
        figure.number: {
            "title": figure.title,
            "verdict": findings.verdict,
            "answer": findings.answer,
            "header": findings.header,
            "rows": findings.rows,
            "data": findings.data,
        }
        for figure, findings in found
    }


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    size = QUICK if options.quick else FULL
    store = Store(OUT / "paper-runs.jsonl", fingerprint(size), is_resumed=options.resume)
    found = reproduce(options.figures, size, store, options.processes)
    result = {
        "benchmark": "paper",
        "size": dataclasses.asdict(size),
        "figures": as_json(found),
    } | provenance(started)
    write_result(options.html, render(found, result))
    if options.json is not None:
        write_json(options.json, result)
    print("| figure | verdict | what we find |\n|---|---|---|")
    for figure, findings in found:
        print(f"| {_label(figure)}: {figure.title} | {findings.verdict} | {findings.answer} |")
    print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
