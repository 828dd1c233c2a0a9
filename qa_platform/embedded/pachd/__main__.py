"""``python -m qa_platform.embedded.pachd --state DIR --address-file FILE``: serves until SIGTERM, SIGINT or the end of standard input."""

from qa_platform.embedded.pachd.server import PachdServer
from qa_platform.embedded.process import Ending, server_arguments, write_atomically


def main() -> None:
    arguments = server_arguments("An embedded pachd.")
    ending = Ending()
    server = PachdServer(arguments.state)
    write_atomically(arguments.address_file, server.address)
    ending.wait()
    server.stop()


if __name__ == "__main__":
    main()
