"""The kernel benchmark behind `nxd-cp bench`.

Read in this order: cases.py, numerics.py, simulated.py, device.py, run.py, report.py, compare.py.
"""
