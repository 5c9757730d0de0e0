"""Benchmarks: one file per question, run as `python -m bench.NAME`.

    trace.py      recorded workloads: load, check, scale, mix
    synthetic.py  built-in workloads calibrated to the paper's Fig. 11
    prompts.py    the token ids of every call, deterministic
    replay.py     open-loop replay of programs against `/generate`
    stats.py      what was measured, as records and as numbers
    server.py     start, watch and stop the servers under test
    report.py     one self-contained HTML page
    charts.py     curves, bars and Gantt rows for such pages
    svg.py        the little SVG that they need
    testing.py    a fake engine, to try a benchmark without a model
    common.py     what every benchmark prints: progress, table, one JSON line
    sim.py        the question "what would a policy do on a GPU that we do not have?"
    sweep.py      the question "which settings are good, and who pays for them?"
    sim_engine.py, sim_cache.py, sim_device.py   the engine it simulates, with the server's core
    atlas.py      the question "what is the critical path worth?"
    infer.py      the question "how often does --program-infer find the right program?"
    paper.py      the question "do the paper's figures hold?"
    paper_runs.py what it simulates; paper_base, _engine, _rates, _fleet, _costs: what it says
    gpu.py        the question "which order serves programs best on a real GPU?"
    import_trace.py   Mooncake's, SGLang's, AIBrix's and OpenAI's logs as recorded workloads
    serve.py      the question "what does a policy do to program latency on a live engine?"

Nothing in the product imports this package.
"""
