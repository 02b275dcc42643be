"""The subcommands of ``disttrain``: one module each, with a ``main(argv)``."""
