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
    "--listen", type=_Address(), default=DEFAULT_LISTEN, show_default=True, help="Where to serve. Anybody who reaches it may read."
)
def metrics(listen: tuple[str, int]) -> None:
    """Serve metrics for Prometheus, until Ctrl-C.

    They are read at each scrape, within seconds, from PostgreSQL, the bucket, Pachyderm and Dagster's storage, as the environment names
    them. What is unavailable is left out, and the rest is served. Nothing is changed. No name of a file, password, token or key is shown.
    """
    import signal
    import sys

    from prometheus_client import CollectorRegistry, start_http_server

    from qa_platform.cli.metrics.exporter import Exporter
    from qa_platform.cli.terminal import one_line
    from qa_platform.errors import InputError

    # A container's first process ends by a signal only if it says so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    exporter = Exporter(lambda text: click.echo(one_line(text), err=True))
    # The first reading imports what it needs, which may take longer than a scrape.
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
