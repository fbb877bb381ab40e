"""The shell around the core: jobs, locks, user code, claims, timers, recovery. Read `advance.py` first."""
