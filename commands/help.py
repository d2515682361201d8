"""Help of commands that have many options: in sections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import click


class SectionedCommand(click.Command):
    """Lists its options under headings; what no section names comes last, as click's own "Options".

    Args:
        sections: heading -> names of the options' parameters.
    """

    def __init__(self, *, sections: Mapping[str, Collection[str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._sections = sections

    def sections(self, ctx: click.Context) -> list[tuple[str, Collection[str]]]:
        """The headings in their order, each with the names of its options' parameters."""
        named = {name for names in self._sections.values() for name in names}
        return [*self._sections.items(), ("Options", [name for name in _options(self, ctx) if name not in named])]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = _options(self, ctx)
        for heading, names in self.sections(ctx):
            records = [record for name in names if (record := options[name].get_help_record(ctx)) is not None]
            with formatter.section(heading):
                formatter.write_dl(records)


class OwnedOption(click.Option):
    """An option that belongs to some of the things between which another option chooses."""

    def __init__(self, *declarations: Any, owners: Collection[str], **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.owners = tuple(owners)


class SettingsCommand(SectionedCommand):
    """Has further options behind its argument, which `look_up` makes when the command runs or prints its help.

    Options of the same owners are listed together, after those that belong to all.

    Args:
        chooser: the option that chooses between owners.
    """

    def __init__(self, *, look_up: Callable[[], list[click.Option]], chooser: str, **attributes: Any) -> None:
        super().__init__(sections={}, **attributes)
        self._look_up = look_up
        self._chooser = chooser

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        argument, *options = super().get_params(ctx)
        return [argument, *self._look_up(), *options]

    def sections(self, ctx: click.Context) -> list[tuple[str, Collection[str]]]:
        found: dict[tuple[str, ...], list[str]] = {(): []}
        for name, option in _options(self, ctx).items():
            found.setdefault(option.owners if isinstance(option, OwnedOption) else (), []).append(name)
        headings = (f"With {self._chooser} {' or '.join(owners)}" if owners else "Options" for owners in found)
        return list(zip(headings, found.values(), strict=True))


def _options(command: click.Command, ctx: click.Context) -> dict[str, click.Option]:
    """The options of a command by their parameters, in order."""
    parameters = (parameter for parameter in command.get_params(ctx) if isinstance(parameter, click.Option))
    return {parameter.name or "": parameter for parameter in parameters}
