"""The only room that speaks SQL.

``tables`` says what there is, ``sql`` has every statement of the advance path, ``codec`` turns rows into the core's
values and back. ``runs``, ``journal`` and ``inbox`` read for a decision, ``apply`` writes one; ``operations`` are the
calls of app code, on any connection.
"""
