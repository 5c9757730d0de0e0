"""The pure scheduling core: standard library only, no clock, no randomness, no I/O.

policy.py   how much service counts against a call (PLAS, ATLAS, ...), as key functions
program.py  programs, their calls, and the table that owns both
queue.py    waiting calls in admission order
infer.py    which program a call is of that does not say, by its tokens
planner.py  View -> Plan: what to admit first and whom to preempt
"""
