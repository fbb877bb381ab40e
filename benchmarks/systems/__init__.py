"""One module for each system that is measured. Each has

- ``SETTINGS``: how it was set up, a sentence;
- ``CASES``: of each case that the system has, the function that measures it;
- ``versions()``: what was measured.
"""
