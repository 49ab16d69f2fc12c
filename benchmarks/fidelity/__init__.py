"""Do the papers' tables hold here? Clips of every method, bit width, policy and peer against the float model's.

A *row* (rows.py, plain data) is one way of quantizing; a *unit* is one row on one sample with one seed. A seed has its
own calibration set and its own evaluation cases. What a unit measured is one JSON file in
build/benchmarks/fidelity/units, named by a hash of everything the numbers follow from (units.py says of what): runs
that were stopped go on where they were, a row that stands in several tables is measured once, and editing text makes
nothing stale.
"""
