"""What the fork server imports once, for all ranks of all tests."""

import recipes.digits  # noqa: F401
