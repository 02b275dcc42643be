"""``python -m disttrain``, as torchrun starts it."""

import sys

from disttrain.cli import main

sys.exit(main())
