"""What every benchmark prints."""

import io
import json
import os
import subprocess
import sys
import time

import pytest

from bench import common, gittins, identity, router, sim, sim_validate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (3, "3"),
        (1234.5, "1234"),
        (0.123456, "0.123"),
        (12.345, "12.3"),
        (0.00001234, "1.2e-05"),
        ("off", "off"),
    ],
)
def test_numbers_have_three_digits_and_the_unknown_a_dash(value, text):
    """Table cells are short, and what is not known does not look like zero."""
    assert common.format_number(value) == text


def test_table_columns_line_up():
    """The first column is left aligned, the others right, and rows have no trailing blanks."""
    table = common.format_table(("name", "ms"), [("a", 1.0), ("longer", None)])

    assert table.splitlines() == ["name    ms", "------  --", "a        1", "longer   -"]


def test_the_result_is_one_line_of_json():
    """A result is printed as one parsable line, and NaN is refused rather than printed."""
    stream = io.StringIO()

    common.print_result({"a": [1, None]}, stream)

    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        common.print_result({"a": float("nan")}, stream)


def test_provenance_names_command_commit_hardware_and_versions():
    """Every result can be traced to what produced it."""
    facts = common.provenance(started=10.0, clock=lambda: 12.34)

    assert list(facts) == ["command", "commit", "hardware", "versions", "seconds"]
    assert facts["seconds"] == 2.3
    assert facts["hardware"]["cores"] >= 1
    assert facts["versions"]["python"]


def test_the_command_is_what_a_person_would_type():
    """The module path and quoting of the command line are restored."""
    argv = ["/x/bench/serve.py", "--server-args", "--a 1"]

    assert common.command_line(argv) == "python -m bench.serve --server-args '--a 1'"


def test_a_result_does_not_say_where_somebody_keeps_their_files(tmp_path):
    """Files are named without their directories."""
    trace = tmp_path / "chat.jsonl"
    trace.touch()
    argv = ["/somewhere/bench/serve.py", "--trace", str(trace), "--json"]
    assert common.command_line(argv) == "python -m bench.serve --trace chat.jsonl --json"


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(capsys):
    """A log file gets a line now and then, not a bar."""
    now = [0.0]

    with common.Progress("run", 5, bar=False, clock=lambda: now[0]) as progress:
        for seconds in (1.0, 11.0, 12.0, 22.0):
            now[0] = seconds
            progress.advance()

    assert capsys.readouterr().err.splitlines() == ["  run: 2 of 5", "  run: 4 of 5"]


@pytest.mark.parametrize(
    ("main", "line", "expected"),
    [
        (sim.main, "--chunk 0", "a whole number from 1, got '0'"),
        (sim.main, "--slots 0", "a whole number from 1, got '0'"),
        (sim.main, "--loads 1 0", "a number above 0, got '0'"),
        (sim.main, "--loads nan", "a number above 0, got 'nan'"),
        (sim.main, "--loads inf", "a number above 0, got 'inf'"),
        (sim.main, "--minutes=-1", "a number above 0, got '-1'"),
        (sim.main, "--minutes nan", "a number above 0, got 'nan'"),
        (gittins.main, "--seeds 0", "a whole number from 1, got '0'"),
        (router.main, "--replicas 0", "a whole number from 1, got '0'"),
        (identity.main, "--programs=-3", "a whole number from 1, got '-3'"),
        (sim_validate.main, "--load many", "a number above 0, got 'many'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(main, line, expected, capsys):
    """The last line names the flag and what it takes; nothing is run."""
    with pytest.raises(SystemExit) as refused:
        main(line.split())

    assert refused.value.code == 2
    flag = line.replace("=", " ").split()[0]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: argument {flag}: expected {expected}")


def test_progress_can_be_a_bar(capsys):
    """Asked for a bar, progress draws one on stderr and leaves stdout to results."""
    with common.Progress("run", 2, bar=True) as progress:
        progress.advance(2)

    captured = capsys.readouterr()
    assert "run" in captured.err
    assert captured.out == ""


def test_foreign_load_is_what_our_own_processes_did_not_use():
    """CPU time of a process outside our trees counts as foreign, that of one inside does not."""
    spin = "import time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as child:
        meters = [common.CpuMeter(pids) for pids in ([], [child.pid], [os.getpid(), child.pid])]
        time.sleep(0.9)
        foreign, rest, twice = (meter.foreign_cores() for meter in meters)

    # However busy the machine is, the spinning child got some of it.
    assert foreign - rest > 0.05
    # Named twice, as itself and as our child, it still counts once.
    assert twice == pytest.approx(rest, abs=0.3)
