"""One front door for many replicas: a ZMQ router that keeps a program where its cache is.

    balance.py   where a call runs: policies as pure functions, standard library only
    messages.py  what router and workers say to each other
    channel.py   one ZMQ socket on an event loop: batches, sessions, keys
    hub.py       the router's side: workers, calls in flight, retries, credits
    metrics.py   its own Prometheus page
    app.py       the HTTP front door, an ASGI app
    config.py    settings, each default written once

A worker is the agent in a replica's HTTP process: `autellix_sglang.engine.worker`.
"""
