"""Help of commands that have many options: in sections."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = (parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option))
        records = {option.name: record for option in options if (record := option.get_help_record(ctx)) is not None}
        for heading, names in self._sections.items():
            with formatter.section(heading):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Options"):
            formatter.write_dl(list(records.values()))
