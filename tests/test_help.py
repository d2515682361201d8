"""Help of the commands whose options stand in sections."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

import build
from commands.help import SectionedCommand

SECTIONED = [name for name, command in build.main.commands.items() if isinstance(command, SectionedCommand)]


def test_most_options_are_in_sections() -> None:
    assert {"analyze", "distill", "quantize", "report"} <= set(SECTIONED)


@pytest.mark.parametrize("name", SECTIONED)
def test_every_option_is_listed_once_and_under_its_heading(name: str) -> None:
    command = build.main.commands[name]
    output = CliRunner().invoke(build.main, [name, "--help"]).output
    first, *_ = command._sections  # type: ignore[attr-defined]
    text = output[output.index(f"\n{first}:\n") + 1 : output.index("  Example:")]
    context = click.Context(command)
    options = {option.name: option for option in command.get_params(context) if isinstance(option, click.Option)}
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(option.opts[-1] for option in options.values())
    *sections, rest = re.split(r"^(\w.*):\n", text, flags=re.MULTILINE)[1:]
    for heading, names in command._sections.items():  # type: ignore[attr-defined]
        of_section = sections[sections.index(heading) + 1]
        assert [options[each].opts[-1] for each in names] == re.findall(r"^  (--[\w-]+)", of_section, re.MULTILINE)
    assert "--help" in rest
