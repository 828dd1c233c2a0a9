"""``python -m qa_platform.embedded.pachd --state DIR --address-file FILE``: serves until SIGTERM, SIGINT or the end of standard input."""

from qa_platform.embedded.pachd.server import PachdServer
from qa_platform.embedded.serving import Shutdown, server_arguments, write_atomically
from qa_platform.settings import EmbeddedPachdSettings


def main() -> None:
    arguments = server_arguments("An embedded pachd.")
    shutdown = Shutdown()
    server = PachdServer(arguments.state, EmbeddedPachdSettings(), token=arguments.token)
    write_atomically(arguments.address_file, server.address)
    shutdown.wait()
    server.stop()


if __name__ == "__main__":
    main()
