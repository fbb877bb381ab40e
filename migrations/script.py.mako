"""${message}"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision).replace("'", '"')}
down_revision = ${repr(down_revision).replace("'", '"')}
branch_labels = None
depends_on = None

# No schema in any name: the search_path is the configured one. Expand first, contract in a later release: workers of
# the version before go on while this runs. Set HEAD in durable/migrate.py.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
