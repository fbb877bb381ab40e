"""``python -m durable.cli``: the command line without its script, as for the processes that a worker starts."""

import sys

from durable.cli import main

sys.exit(main())
