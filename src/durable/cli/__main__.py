"""``python -m durable.cli``: the command line where no script is installed, as for the processes that a worker starts."""

import sys

from durable.cli import main

sys.exit(main())
