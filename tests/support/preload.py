"""What the fork server imports once, for all ranks of all tests."""

import disttrain.commands.training
import recipes.digits  # noqa: F401
