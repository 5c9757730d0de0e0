"""The HTML page about a benchmark."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import pytest

from bench import report, serve, svg
from bench.stats import CallRecord, Outcome, ProgramRecord, Run
from bench.svg import Scale
from bench.trace import Mix, TraceCall, TraceProgram


def run(policy: str, pace: float, queue_s: float | None, count: int = 12) -> Run:
    """Programs of growing size; each call queues `queue_s` and then takes `pace` per token."""

    def program(i: int) -> ProgramRecord:
        finish = i + (queue_s or 0.0) + pace * (i + 1)
        call = CallRecord(
            "0",
            Outcome.OK,
            issue_s=float(i),
            finish_s=finish,
            num_output=i + 1,
            queue_s=queue_s,
            output_hash="h",
        )
        return ProgramRecord(f"<p{i}>", "chat", float(i), float(i), (call,))

    return Run(policy, tuple(program(i) for i in range(count)), "hash")


def page(runs: dict[str, Sequence[Run]]) -> str:
    options = dataclasses.replace(
        serve.ServeOptions(), policies=tuple(runs), programs=12, rate=1.0, trace=("a&b.jsonl",)
    )
    call = TraceCall("0", 5, 5, 3)
    mix = Mix(tuple(TraceProgram(str(i), "c", "chat", (call,)) for i in range(12)), 0, 12)
    result = serve.make_result(runs, mix, options, serve.Offered(1.0, None, None))
    return report.render(result, runs)


QUEUED = {"off": [run("off", 0.5, 2.0)], "plas": [run("plas", 0.5, 0.5)]}


def test_the_page_is_one_well_formed_self_contained_document():
    """The page parses as XML, runs no script and refers to nothing outside itself."""
    html = page(QUEUED)
    void = html.replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width, initial-scale=1">', ""
    )

    ElementTree.fromstring(void.removeprefix("<!doctype html>"))
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "prefers-color-scheme: dark" in html


def test_the_headline_is_the_ratio_of_mean_program_token_latency():
    """The first thing said is how much faster or slower programs are under the policy."""
    faster = page(QUEUED)
    slower = page({"off": [run("off", 0.5, 0.5)], "plas": [run("plas", 0.5, 2.0)]})

    assert "</em> as fast under <b>plas</b>" in faster
    assert "</em> slower under <b>plas</b>" in slower


def test_without_a_queue_the_page_claims_nothing():
    """A run in which nothing waited is not presented as a result."""
    html = page({"off": [run("off", 1.0, 0.0)], "plas": [run("plas", 0.5, 0.0)]})

    assert "Nothing had to wait" in html
    assert "differences between policies are noise" in html


def test_every_chart_is_there_and_text_is_escaped():
    """The page has all its sections, and names from files cannot break the markup."""
    html = page(QUEUED)

    for anchor in ("latency", "cdf", "sizes", "strips", "table", "method"):
        assert f'<section id="{anchor}">' in html
    assert "a&amp;b" in html
    assert "&lt;p0&gt;" in html
    assert "<p0>" not in html


def test_waiting_is_drawn_only_where_it_is_known():
    """Without queueing times the strips say so instead of showing calls as running."""
    unknown = page({p: [run(p, 0.5, None)] for p in ("off", "plas")})

    assert 'class="wait"' in page(QUEUED)
    assert 'class="wait"' not in unknown
    assert "does not report queueing" in unknown


def test_one_policy_alone_and_failed_runs_still_make_a_page():
    """A page needs no second policy and no completed program."""
    failed = ProgramRecord(
        "p", "chat", 0.0, 0.0, (CallRecord("0", Outcome.ERROR, "x", issue_s=0.0, finish_s=1.0),)
    )
    nothing = {name: [Run(name, (failed,) * 12, "h")] for name in ("off", "plas")}

    assert "Programs under <b>off</b>" in page({"off": QUEUED["off"]})
    assert "no programs to compare" in page(nothing)


def test_spans_of_calls_side_by_side_merge():
    """A program that runs several calls at once is drawn as running once."""
    assert report._union([(0, 2), (1, 3), (5, 5), (4, 6)]) == [(0, 3), (4, 6)]


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10, 0, 100), [0, 2, 4, 6, 8, 10]),
        (Scale(0, 0.7, 0, 100), [0, 0.2, 0.4, 0.6]),
        (Scale(3, 300, 0, 100, is_log=True), [5, 10, 20, 50, 100, 200]),
    ],
)
def test_ticks_are_round_numbers_inside_the_scale(scale, ticks):
    """Axes are labelled with few, round values, none of them outside."""
    assert scale.ticks() == pytest.approx(ticks)


def test_scales_map_their_ends_to_their_pixels():
    """The ends of a domain are the ends of the range, on linear and logarithmic scales."""
    assert [Scale(2, 4, 10, 20)(v) for v in (2, 3, 4)] == [10, 15, 20]
    assert [Scale(1, 100, 0, 10, is_log=True)(v) for v in (1, 10, 100)] == [0, 5, 10]


def test_attributes_and_text_are_escaped():
    """Whatever is put into an element stays data."""
    assert (
        svg.text(1.0, 2.5, "<&", class_='a"b')
        == '<text x="1" y="2.5" class="a&quot;b">&lt;&amp;</text>'
    )
