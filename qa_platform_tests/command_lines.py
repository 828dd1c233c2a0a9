"""Command lines, parsed by the programs' own parsers without running them."""

import click


def parse_click(command: click.Command, arguments: list[str]) -> None:
    """Parse arguments, down to the subcommand that they name.

    Raises:
        click.UsageError: the parser refuses them.
    """
    context, name = None, "program"
    while True:
        try:
            context = command.make_context(name, arguments, parent=context)
        except click.exceptions.Exit:
            # --help and --version end here.
            return
        if not isinstance(command, click.Group):
            return
        resolved, found, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert resolved
        assert found
        name, command = resolved, found
