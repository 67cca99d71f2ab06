"""The demonstration behind `nxd-cp demo`: training on 1, 2 and 4 ranks gives the same loss.

Read in this order: settings.py, data.py, model.py, train.py, launch.py, report.py.
"""
