"""The checks of ``disttrain doctor``: one module per subject, each returning findings instead of raising."""
