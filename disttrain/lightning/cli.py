"""Lightning's command line, with public names for the protected methods that disttrain overrides."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class CLIBase(LightningCLI):
    """A command line whose subcommands are methods that read their arguments from the configuration."""

    runs = True
    """Whether to run the subcommand or only read its configuration."""

    def given(self, name: str) -> Any:
        """Return a setting of this subcommand; None if it does not exist."""
        assert self.subcommand is not None
        return self.config[self.subcommand].get(name)

    def fills(self, subcommand: str) -> bool:
        """Return whether a subcommand's parser is needed; building one takes 0.2 s."""
        return True

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Add arguments to a subcommand's parser, after Lightning's."""

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
