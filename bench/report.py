"""One self-contained HTML page about a `bench.serve` result: no scripts, no fonts, no network.

Charts are inline SVG drawn from the runs themselves, so the page can be mailed or archived as it
is. The first policy is the baseline and always grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from autellix_sglang.config import ProgramConfig
from bench import svg
from bench.common import format_number
from bench.stats import CallRecord, ProgramRecord, Run
from bench.svg import Frame, Scale

Runs = Mapping[str, Sequence[Run]]
Spans = list[tuple[float, float]]

TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH = 960.0
MAX_STRIPS = 22
NUM_COLOURS = 9  # CSS classes p0 to p8
KINDS = {"chat": "chat", "react": "ReAct", "tree": "tree search", "coding": "coding agent"}


def render(result: Mapping[str, Any], runs: Runs) -> str:
    """The page: `result` as `bench.serve` prints it, `runs` the records behind it."""
    hero = hero_policy(result)
    sections = [
        section("Latency per token", "latency", latency_bars(result)),
        section("All programs", "cdf", latency_curves(runs)),
        section("Who gains, who pays", "sizes", size_bars(result)) if hero else "",
        section("What programs live through", "strips", strips(runs, result["baseline"], hero)),
        section("Numbers", "table", results_table(result)),
        section("How this was measured", "method", method(result)),
    ]
    body = headline(result, hero) + "".join(sections)
    return page(f"{result['trace']}: {', '.join(runs)}", body)


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is markup; everything it needs is in it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )


def hero_policy(result: Mapping[str, Any]) -> str | None:
    """The policy the headline is about: the default one if it ran, else the last; None if alone."""
    others = [e["policy"] for e in result["results"] if e["policy"] != result["baseline"]]
    default = ProgramConfig().policy
    return default if default in others else others[-1] if others else None


def _entry(result: Mapping[str, Any], policy: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = next(e for e in result["results"] if e["policy"] == policy)
    return entry


# --- headline -----------------------------------------------------------------------------------


def headline(result: Mapping[str, Any], hero: str | None) -> str:
    """The result in one sentence, and the few numbers that qualify it."""
    baseline = result["baseline"]
    load = "" if result["load"] is None else f", load {result['load']:g} of capacity"
    about = f"{result['trace']}{load}, {result['rate_programs_per_s']:.2f} programs/s"
    kicker = f'<p class="kicker">{escape(about)}</p>'
    if hero is None:
        return f"<header>{kicker}<h1>Programs under <b>{escape(baseline)}</b></h1></header>"
    entry = _entry(result, hero)
    mean = entry["ratio"]["program_token_latency_ms"]["mean"]
    sentence = _sentence(hero, baseline, mean)
    if result["is_queueing"] is False:
        sentence = f"Nothing had to wait, so <b>{escape(hero)}</b> had nothing to decide"
    notes = "".join(f'<p class="note">{escape(caveat)}</p>' for caveat in result["caveats"])
    tiles = f'<div class="tiles">{_tiles(entry, baseline)}</div>'
    return f"<header>{kicker}<h1>{sentence}</h1>{tiles}{notes}</header>"


def _sentence(hero: str, baseline: str, ratio: float | None) -> str:
    name, other = f"<b>{escape(hero)}</b>", f"<i>{escape(baseline)}</i>"
    if not ratio:
        return f"{name} and {other}: no programs to compare"
    if 0.98 < ratio < 1.02:
        return f"Programs get their tokens as fast under {name} as under {other}"
    times = f"<em>{max(ratio, 1 / ratio):.2f}{TIMES}</em>"
    if ratio < 1:
        return f"Programs get their tokens {times} as fast under {name} as under {other}"
    return f"Programs get their tokens {times} slower under {name} than under {other}"


def _tiles(entry: Mapping[str, Any], baseline: str) -> str:
    latency = entry["ratio"]["program_token_latency_ms"]
    against = f", against {baseline}"
    tiles = [
        (_times(latency["mean"]), "mean time per token" + against),
        (_times(latency["p99"]), "p99 time per token" + against),
        (_times(entry["ratio"]["engine_tokens_per_s"]), "tokens per second" + against),
        (_times(entry["longest_decile_response_ratio"]), "response of the longest tenth" + against),
        (str(entry["lost"]), "calls lost"),
    ]
    return "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(name)}</span></div>'
        for value, name in tiles
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}{TIMES}"


# --- charts -------------------------------------------------------------------------------------


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Colour keys: (CSS class, words) pairs."""
    keys = [f'<span><i class="{css}"></i>{escape(words)}</span>' for css, words in names]
    return f'<div class="legend">{"".join(keys)}</div>'


def _policy_legend(policies: Iterable[str]) -> str:
    return legend([(f"p{i}", policy) for i, policy in enumerate(policies)])


def latency_bars(result: Mapping[str, Any]) -> str:
    """Mean and percentiles of program token latency, one bar per policy."""
    entries = result["results"]
    keys = ("mean", "p50", "p95", "p99")
    values = [[e["program_token_latency_ms"][key] for e in entries] for key in keys]
    highest = max((v for group in values for v in group if v is not None), default=1.0)
    frame = Frame(56, 40, WIDTH - 10, 300)
    scale = Scale(0, highest * 1.08, frame.bottom, frame.top)
    axis = frame.y_axis(scale, "ms per generated token")
    slots = _slots(frame, len(keys), len(entries))
    bars = [
        _labelled_bar(slots[g][i], scale, value, f"p{i}", entries[i]["policy"])
        for g, group in enumerate(values)
        for i, value in enumerate(group)
    ]
    names = [_group_name(slots[g], frame, key) for g, key in enumerate(keys)]
    chart = svg.image(WIDTH, 335, "Program token latency by policy", axis, *bars, *names)
    words = (
        "Program token latency: time from a program's arrival to its last answer, divided by the"
        " tokens it generated. Lower is better."
    )
    return _policy_legend(e["policy"] for e in entries) + chart + caption(words)


def _slots(frame: Frame, groups: int, bars: int) -> list[list[tuple[float, float]]]:
    """For each group of bars, the (left edge, width) of each bar."""
    pitch = (frame.right - frame.left) / groups
    width = min(64.0, pitch * 0.76 / bars)
    inset = (pitch - width * bars) / 2
    return [
        [(frame.left + g * pitch + inset + i * width, width) for i in range(bars)]
        for g in range(groups)
    ]


def _group_name(slots: Sequence[tuple[float, float]], frame: Frame, name: str) -> str:
    middle = (slots[0][0] + slots[-1][0] + slots[-1][1]) / 2
    return svg.text(middle, frame.bottom + 22, name, class_="group", text_anchor="middle")


def _labelled_bar(
    slot: tuple[float, float], scale: Scale, value: float | None, css: str, policy: str
) -> str:
    if value is None:
        return ""
    left, width = slot
    top, middle = scale(value), left + width / 2
    tip = svg.title(f"{policy}: {value:.2f} ms per token")
    bar = svg.rectangle(left + 2, top, width - 4, scale(0) - top, tip, class_=css, rx=3)
    words = format_number(value)
    return bar + svg.text(middle, top - 6, words, class_="value", text_anchor="middle")


def latency_curves(runs: Runs) -> str:
    """The distribution of program token latency: share of programs that are at least as fast."""
    values = {policy: _latencies(repeats) for policy, repeats in runs.items()}
    known = [v for latencies in values.values() for v in latencies if v > 0]
    if not known:
        return caption("No program completed.")
    frame = Frame(56, 40, WIDTH - 16, 320)
    x = Scale(min(known) * 0.9, max(known) * 1.1, frame.left, frame.right, is_log=True)
    y = Scale(0, 100, frame.bottom, frame.top)
    axes = frame.x_axis(x, "program token latency, ms (logarithmic)") + frame.y_axis(
        y, "% of programs", [0, 25, 50, 75, 100]
    )
    curves = [
        _curve(latencies, x, y, i, policy) for i, (policy, latencies) in enumerate(values.items())
    ]
    chart = svg.image(WIDTH, 366, "Distribution of program token latency", axes, *curves)
    return _policy_legend(runs) + chart + caption("Further left is better at every height.")


def _latencies(repeats: Sequence[Run]) -> list[float]:
    return sorted(p.token_latency_ms for run in repeats for p in run.complete)


def _curve(latencies: Sequence[float], x: Scale, y: Scale, index: int, policy: str) -> str:
    if not latencies:
        return ""
    steps = [f"M{x(latencies[0]):.1f} {y(0):.1f}"]
    for rank, value in enumerate(latencies, start=1):
        steps.append(f"H{x(value):.1f}V{y(100 * rank / len(latencies)):.1f}")
    steps.append(f"H{x.stop:.1f}")
    return svg.element("path", svg.title(policy), d="".join(steps), class_=f"curve p{index}")


def size_bars(result: Mapping[str, Any]) -> str:
    """Mean response against the baseline's, by size of program; below 1 gains, above 1 pays."""
    entries = result["results"]
    groups = len(entries[0]["response_ratio_by_size"])
    values = [r for e in entries[1:] for r in e["response_ratio_by_size"] if r]
    if not values:
        return caption("No program completed under every policy.")
    frame = Frame(56, 40, WIDTH - 10, 320)
    low, high = min(0.8, *values) / 1.12, max(1.25, *values) * 1.12
    scale = Scale(low, high, frame.bottom, frame.top, is_log=True)
    axis = frame.y_axis(scale, f"{TIMES} response time of the baseline", _ratio_ticks(low, high))
    slots = _slots(frame, groups, len(entries) - 1)
    bars = [
        _ratio_bar(slots[g][i - 1], scale, entry["response_ratio_by_size"][g], i, entry["policy"])
        for i, entry in enumerate(entries)
        for g in range(groups)
        if i
    ]
    one = svg.line(frame.left, scale(1), frame.right, scale(1), class_="one")
    names = [_group_name(slots[g], frame, _size_name(g, groups)) for g in range(groups)]
    label = "Response time against the baseline by program size"
    chart = svg.image(WIDTH, 355, label, axis, *bars, one, *names)
    words = (
        "Programs in equal groups from fewest to most generated tokens. A bar below the line:"
        " these programs finish sooner than under the baseline; above it: they pay."
    )
    return _policy_legend(e["policy"] for e in entries) + chart + caption(words)


def _ratio_ticks(low: float, high: float) -> list[float]:
    coarse = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0)
    return [tick for tick in (fine if high / low < 5 else coarse) if low <= tick <= high]


def _size_name(group: int, groups: int) -> str:
    return "smallest" if group == 0 else "largest" if group == groups - 1 else str(group + 1)


def _ratio_bar(
    slot: tuple[float, float], scale: Scale, ratio: float | None, index: int, policy: str
) -> str:
    if not ratio:
        return ""
    left, width = slot
    top, bottom = sorted((scale(ratio), scale(1)))
    tip = svg.title(f"{policy}: {ratio:.2f} {TIMES} the baseline's mean response")
    bar = svg.rectangle(left + 1, top, width - 2, bottom - top, tip, class_=f"p{index}", rx=2)
    at = scale(ratio) + (13 if ratio < 1 else -5)
    words = f"{ratio:.2f}" if width >= 26 else ""
    return bar + svg.text(left + width / 2, at, words, class_="value", text_anchor="middle")


# --- strips -------------------------------------------------------------------------------------


def strips(runs: Runs, baseline: str, hero: str | None) -> str:
    """The same sample of programs under the baseline and the headline's policy, call by call."""
    shown = [policy for policy in (baseline, hero) if policy is not None]
    firsts = {policy: runs[policy][0] for policy in shown}
    indices = _sample_rows(firsts[baseline])
    end = max((_end(run.programs[i]) for run in firsts.values() for i in indices), default=1.0)
    panels = [_strip_panel(policy, run, indices, end) for policy, run in firsts.items()]
    is_known = all(c.queue_s is not None for r in firsts.values() for c in r.calls if c.is_ok)
    keys = [("wait", "waiting in the engine's queue")] if is_known else []
    running = "running" if is_known else "in the engine (this server does not report queueing)"
    words = (
        "One row per program, by arrival. A program runs while any of its calls runs."
        " A call's waiting is drawn at its start; preempted calls wait in between, too."
        " A thin line is time outside the engine (tools, people)."
    )
    legend_ = legend([*keys, ("run", running), ("idle", "between calls"), ("fail", "failed")])
    return legend_ + "".join(panels) + caption(words)


def _sample_rows(run: Run) -> list[int]:
    order = sorted(range(len(run.programs)), key=lambda i: run.programs[i].arrival_s)
    count = min(MAX_STRIPS, len(order))
    return [order[i * len(order) // count] for i in range(count)]


def _end(program: ProgramRecord) -> float:
    return max((c.finish_s for c in program.calls if c.finish_s is not None), default=0.0)


def _strip_panel(policy: str, run: Run, indices: Sequence[int], end: float) -> str:
    row = 17.0
    frame = Frame(150, 34, WIDTH - 16, 34 + row * len(indices))
    scale = Scale(0, max(end, 1e-3), frame.left, frame.right)
    rows = [
        _strip(run.programs[index], scale, frame.top + row * n + 2, row - 5)
        for n, index in enumerate(indices)
    ]
    heading = svg.text(0, 18, f"under {policy}", class_="heading")
    axis = frame.x_axis(scale, "seconds since the first arrival", scale.ticks(10))
    label = f"Programs over time under {policy}"
    return svg.image(WIDTH, frame.bottom + 46, label, heading, axis, *rows)


def _strip(program: ProgramRecord, scale: Scale, top: float, height: float) -> str:
    tokens = f"{program.generated_tokens:,} tokens".replace(",", "\u202f")
    name = KINDS.get(program.kind, program.kind)
    label = svg.text(142, top + height - 2, f"{name}, {tokens}", class_="tick", text_anchor="end")
    middle = top + height / 2
    idle = svg.line(scale(program.arrival_s), middle, scale(_end(program)), middle, class_="idle")
    bars = [
        svg.rectangle(scale(a), top, max(0.8, scale(b) - scale(a)), height, class_=css, rx=1.5)
        for css, spans in _states(program.calls)
        for a, b in spans
    ]
    outcome = f"{program.response_s:.1f} s" if program.is_complete else "not completed"
    tip = svg.title(f"{program.program_id}: {len(program.calls)} calls, {tokens}, {outcome}")
    return svg.element("g", tip, idle, *bars, label)


def _states(calls: Sequence[CallRecord]) -> list[tuple[str, Spans]]:
    """Times of waiting, running and failed calls; later entries are painted over earlier ones."""
    done = [call for call in calls if call.is_ok]
    failed = [c for c in calls if not c.is_ok and c.issue_s is not None and c.finish_s is not None]
    starts = [min(call.span[0] + (call.queue_s or 0.0), call.span[1]) for call in done]
    return [
        ("wait", _union((c.span[0], s) for c, s in zip(done, starts, strict=True))),
        ("run", _union((s, c.span[1]) for c, s in zip(done, starts, strict=True))),
        ("fail", _union(call.span for call in failed)),
    ]


def _union(spans: Iterable[tuple[float, float]]) -> Spans:
    merged: Spans = []
    for start, stop in sorted(span for span in spans if span[1] > span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


# --- table and method ---------------------------------------------------------------------------

Column = tuple[str, Callable[[Mapping[str, Any]], object]]


def _part(key: str, name: str) -> Callable[[Mapping[str, Any]], object]:
    return lambda entry: entry[key][name]


def _value(key: str) -> Callable[[Mapping[str, Any]], object]:
    return lambda entry: entry[key]


def _percent(key: str) -> Callable[[Mapping[str, Any]], object]:
    return lambda entry: None if entry[key] is None else f"{100 * entry[key]:.1f} %"


_SHARES = ("mean", "p50", "p95", "p99")
COLUMNS: tuple[tuple[str, tuple[Column, ...]], ...] = (
    ("ms per token", tuple((s, _part("program_token_latency_ms", s)) for s in _SHARES)),
    ("response, s", tuple((s, _part("program_response_s", s)) for s in _SHARES)),
    (
        "tokens/s",
        (("all", _value("engine_tokens_per_s")), ("steady", _value("steady_tokens_per_s"))),
    ),
    (
        "engine",
        (
            ("preempted", _value("preemptions")),
            ("prefix hits", _percent("prefix_hit_rate")),
            ("waiting", _percent("wait_share")),
            ("lost", _value("lost")),
        ),
    ),
)


def results_table(result: Mapping[str, Any]) -> str:
    """Every policy's numbers, in the order they ran."""
    groups = "".join(f'<th colspan="{len(columns)}">{name}</th>' for name, columns in COLUMNS)
    heads = "".join(f"<th>{name}</th>" for _, columns in COLUMNS for name, _ in columns)
    rows = "".join(_table_row(i, entry) for i, entry in enumerate(result["results"]))
    head = f"<tr><th></th>{groups}</tr><tr><th>policy</th>{heads}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _table_row(index: int, entry: Mapping[str, Any]) -> str:
    cells = [
        f"<td>{escape(format_number(read(entry)))}</td>"
        for _, columns in COLUMNS
        for _, read in columns
    ]
    name = f'<th><i class="p{index}"></i>{escape(entry["policy"])}</th>'
    return f"<tr>{name}{''.join(cells)}</tr>"


def method(result: Mapping[str, Any]) -> str:
    """What was run, on what, and how to run it again."""
    work = result["workload"]
    kinds = ", ".join(f"{n} {KINDS.get(kind, kind)}" for kind, n in work["kinds"].items())
    facts = {
        "workload": f"{result['trace']}, token counts {TIMES} {result['scale']:g}: {kinds};"
        f" {work['calls']:,} calls, {work['output_tokens']:,} tokens to generate",
        "arrivals": f"{result['arrivals']}, {result['rate_programs_per_s']:.3f} programs/s",
        "gaps between calls": result["gaps"],
        "repeats": _repeats(result["results"]),
        "outputs": "identical token for token under every policy"
        if result["identical_outputs"]
        else "differ between runs",
        "server flags": " ".join(result["server_flags"]),
        **provenance_facts(result),
    }
    return definitions(facts)


def definitions(facts: Mapping[str, object]) -> str:
    """Names and what they are; those that are None are left out."""
    rows = [f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None]
    return f"<dl>{''.join(rows)}</dl>"


def provenance_facts(result: Mapping[str, Any]) -> dict[str, object]:
    """What a number belongs to, for `definitions`."""
    return {
        "command": result.get("command"),
        "commit": result.get("commit"),
        "hardware": _flat(result.get("hardware")),
        "versions": _flat(result.get("versions")),
        "took": f"{result['seconds']:.0f} s" if "seconds" in result else None,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table: the first column to the left, numbers to three digits."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(format_number(cell))}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _repeats(entries: Sequence[Mapping[str, Any]]) -> str:
    repeats = max(entry["repeats"] for entry in entries)
    if repeats == 1:
        return "1"
    spread = [
        f"{entry['policy']} {low:.2f} to {high:.2f}"
        for entry in entries[1:]
        for low, high in [entry["ratio_range"] or (math.nan, math.nan)]
    ]
    return f"{repeats}, medians shown; mean ratio over the repeats: {', '.join(spread)}"


def _flat(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return None
    return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)


def section(heading: str, anchor: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>'


def caption(words: str) -> str:
    return f'<p class="caption">{words}</p>'


STYLE = (
    """
:root { color-scheme: light dark; --paper: #fcfcfa; --card: #ffffff; --ink: #1b1d22;
  --soft: #686d76; --rule: #e4e4df; --c0: #9aa0a8; --c1: #3457d5; --c2: #12937f; --c3: #d9822b;
  --c4: #b23a7a; --c5: #6b7f1e; --c6: #7a5cc8; --c7: #a0522d; --c8: #2b8cbe;
  --wait: #f0b429; --run: #2f7d5d; --fail: #cf3a3a; }
@media (prefers-color-scheme: dark) { :root { --paper: #131519; --card: #1b1e24; --ink: #ecebe6;
  --soft: #9aa0aa; --rule: #2e323a; --c0: #7b828c; --c1: #7c9bff; --c2: #3ecab2; --c3: #f0a457;
  --c4: #e678b3; --c5: #a9c24a; --c6: #a78bfa; --c7: #d08c60; --c8: #6cbdf0;
  --wait: #e0a92e; --run: #46b388; --fail: #ff6b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px; }
header { margin-bottom: 44px; }
.kicker { margin: 0 0 10px; color: var(--soft); font-size: 15px; }
h1 { margin: 0 0 28px; font-size: clamp(30px, 5vw, 52px); line-height: 1.1; font-weight: 650;
  letter-spacing: -0.02em; max-width: 20em; text-wrap: balance; }
h1 b { color: var(--c1); font-weight: inherit; } h1 i { color: var(--soft); font-style: normal; }
h1 em { font-style: normal; border-bottom: 4px solid var(--c1); }
h2 { margin: 0 0 14px; font-size: 21px; letter-spacing: -0.01em; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 14px;
  padding: 24px 26px 18px; margin: 0 0 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 29px; line-height: 1.15; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; margin-top: 5px; color: var(--soft); font-size: 13px;
  line-height: 1.35; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; font-size: 14px; color: var(--soft); }
.legend i, th i { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 7px; }
.note { margin: 14px 0 0; padding: 9px 14px; border-left: 4px solid var(--wait);
  background: var(--card); font-size: 14px; }
.caption { margin: 8px 0 4px; color: var(--soft); font-size: 14px; max-width: 68ch; }
svg { display: block; width: 100%; height: auto; margin: 6px 0; overflow: visible;
  font-family: inherit; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); } svg .base, svg .one { stroke: var(--ink); stroke-width: 1.2; }
svg text { fill: var(--ink); font-size: 13px; } svg .tick { fill: var(--soft); font-size: 12px; }
svg .axis { fill: var(--soft); font-size: 13px; } svg .value { font-size: 12px; }
svg .heading { font-size: 15px; font-weight: 600; } svg .group { font-size: 14px; }
.curve { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
"""
    + "".join(
        f".p{i} {{ fill: var(--c{i}); background: var(--c{i}); }}"
        f" .curve.p{i} {{ fill: none; stroke: var(--c{i}); }}\n"
        for i in range(NUM_COLOURS)
    )
    + """
svg rect:hover, svg g:hover rect { opacity: 0.8; }
.wait { fill: var(--wait); background: var(--wait); }
.run { fill: var(--run); background: var(--run); }
.fail { fill: var(--fail); background: var(--fail); }
svg .level { stroke: var(--soft); stroke-dasharray: 5 4; }
svg .inside { fill: #fff; font-size: 12px; font-weight: 600; }
.panels { display: grid; gap: 8px 22px;
  grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); }
.answer { font-size: 18px; margin: 0 0 10px; max-width: 62ch; }
.question { color: var(--soft); margin: 0 0 6px; max-width: 68ch; }
.verdict { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 13px;
  margin-left: 10px; vertical-align: 3px; color: #fff; font-weight: 600; background: var(--soft); }
.verdict.agrees { background: var(--run); } .verdict.partly { background: var(--c3); }
.verdict.disagrees { background: var(--fail); }
svg .idle { stroke: var(--soft); stroke-width: 1; opacity: 0.7; }
.legend .idle { height: 2px; vertical-align: middle; background: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-weight: 500; } tbody tr { border-top: 1px solid var(--rule); }
tr > :first-child { text-align: left; }
thead tr:first-child th[colspan] { text-align: center; border-bottom: 1px solid var(--rule); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 0;
  font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 32px 14px 48px; } section { padding: 18px 14px 12px; }
  section { overflow-x: auto; } svg { min-width: 680px; }
  dl { grid-template-columns: 1fr; } dt { margin-top: 6px; } }
"""
)
