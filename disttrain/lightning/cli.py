"""Lightning's command line with public names for what disttrain overrides in it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class CLIBase(LightningCLI):
    """A command line whose subcommands are methods of its own, which take what they need from the configuration."""

    runs = True
    """Whether to run the subcommand, or to read its configuration alone."""

    def given(self, name: str) -> Any:
        """The value of a setting of this subcommand; None if it has none of that name."""
        assert self.subcommand is not None
        return self.config[self.subcommand].get(name)

    def fills(self, subcommand: str) -> bool:
        """Whether the parser of a subcommand is needed; filling one takes a fifth of a second."""
        return True

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Add to the arguments that Lightning has put into a subcommand's parser."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if not self.fills(subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_subcommand_arguments(parser, subcommand)
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {}

    def _run_subcommand(self, subcommand: str) -> None:
        if self.runs:
            super()._run_subcommand(subcommand)

    def _set_seed(self) -> None:
        if self.runs:
            super()._set_seed()
