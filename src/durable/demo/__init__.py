"""A shop that takes orders: what ``durable demo`` runs, and an example to read.

- ``orders.py``: the workflow. Begin here.
- ``shop.py``: the shop's own tables, and what the steps write there.
- ``audit.py``: do the books add up?
- ``stage.py``: the demo itself: workers, one of them killed, and somebody who approves large orders.
"""
