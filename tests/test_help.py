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
    assert {"analyze", "distill", "engine", "export", "quantize", "report"} <= set(SECTIONED)


@pytest.mark.parametrize("name", SECTIONED)
def test_every_option_is_listed_once_and_under_its_heading(name: str) -> None:
    command = build.main.commands[name]
    assert isinstance(command, SectionedCommand)
    output = CliRunner().invoke(build.main, [name, "--help"]).output
    context = click.Context(command)
    expected = command.sections(context)
    text = output[output.index(f"\n{expected[0][0]}:\n") + 1 : output.index("  Example:")]
    options = {option.name: option for option in command.get_params(context) if isinstance(option, click.Option)}
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert sorted(listed) == sorted(option.opts[-1] for option in options.values())
    parts = re.split(r"^(\w.*):\n", text, flags=re.MULTILINE)[1:]
    assert parts[::2] == [heading for heading, _ in expected]
    for of_section, (_, names) in zip(parts[1::2], expected, strict=True):
        found = re.findall(r"^  (?:-\w, )?(--[\w-]+)", of_section, re.MULTILINE)
        assert found == [options[each].opts[-1] for each in names]
