"""Other people's NKI kernels, run unmodified from a clone that the user has.

    python scripts/run_public_kernels.py PATH_TO_CLONE [PATH...]

`catalogue` says which kernels, `runner` runs them in child processes, `results` keeps what came
out, `table` prints it. `library/` is the adapter for nki-library's own tests, `scripts` runs
the documentation's and the samples' scripts. Holds no line of the kernels themselves.
"""
