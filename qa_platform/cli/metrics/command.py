"""The command `qa-platform metrics`."""

import click

DEFAULT_LISTEN = "127.0.0.1:9464"


class _Address(click.ParamType):
    """``host:port``; an IPv6 address in brackets."""

    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        host, colon, port = str(value).rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            self.fail(f"{value!r} is not host:port, such as {DEFAULT_LISTEN}", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


@click.command()
@click.option(
    "--listen",
    type=_Address(),
    default=DEFAULT_LISTEN,
    show_default=True,
    help="Where to serve. Anyone who can reach it can read the metrics.",
)
def metrics(listen: tuple[str, int]) -> None:
    """Serve metrics for Prometheus, until Ctrl-C.

    They are read at each scrape, within seconds, from PostgreSQL, the bucket, Pachyderm and Dagster's storage, as the environment names
    them. If a service is unavailable, the others' metrics are still served. Nothing is changed. File names, passwords, tokens and keys are
    never shown.
    """
    import signal
    import sys

    from prometheus_client import CollectorRegistry, start_http_server

    from qa_platform.cli.metrics.exporter import Exporter
    from qa_platform.cli.terminal import one_line
    from qa_platform.errors import InputError

    # The first process of a container ignores signals for which it has no handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    exporter = Exporter(lambda text: click.echo(one_line(text), err=True))
    # The first reading imports its libraries, which may take longer than a scrape.
    list(exporter.collect())
    registry = CollectorRegistry(auto_describe=False)
    registry.register(exporter)
    host, port = listen
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}", advice="choose another address with --listen") from error
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"serving http://{shown}:{server.server_port}/metrics", err=True)
    thread.join()
