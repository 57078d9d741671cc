"""`docs/cli.md`: every command with its arguments and options, from click's own words."""

from collections.abc import Iterator

import click

HEAD = """\
# The command line

Every command of `appliance`, generated from its help (`make cli`). Commands that print state have `--json`. Results go
to standard output; a failure is one line on standard error and exit status 1, a wrong command line is status 2.

Shell completion comes with the command: put the line of your shell into its start-up file.

    eval "$(_APPLIANCE_COMPLETE=bash_source appliance)"        # ~/.bashrc; also zsh_source
    _APPLIANCE_COMPLETE=fish_source appliance | source         # ~/.config/fish/completions/appliance.fish
"""


def reference(root: click.Group) -> str:
    """The page for a command and all below it."""
    context = click.Context(root, info_name="appliance")
    return "\n".join([HEAD, *_sections(root, context)])


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    if not isinstance(command, click.Group):
        yield _section(command, context)
        return
    for name in command.list_commands(context):
        found = _real(command.get_command(context, name))
        assert found is not None
        yield from _sections(found, click.Context(found, info_name=name, parent=context))


def _real(command: click.Command | None) -> click.Command | None:
    """The command itself, where its module is imported only when it is called."""
    load = getattr(command, "load", None)
    return command if load is None else load()


def _section(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## {context.command_path}", "", f"    {usage}", "", _prose(command), ""]
    options = [it.get_help_record(context) for it in command.get_params(context) if isinstance(it, click.Option)]
    rows = [f"| `{record[0]}` | {_cell(record[1])} |" for record in options if record and "--help" not in record[0]]
    return "\n".join(lines + (["| option | |", "|---|---|", *rows, ""] if rows else []))


def _prose(command: click.Command) -> str:
    paragraphs = (command.help or command.short_help or "").split("\n\n")
    return "\n\n".join(" ".join(it.split()) for it in paragraphs)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
