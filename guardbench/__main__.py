"""`python -m guardbench`, and the `guardbench` that pip installs."""

from guardbench.interrupts import heard


def main() -> None:
    """The command line, with the signals heard before anything else is imported."""
    with heard():
        from guardbench.cli import main as command

        command()


if __name__ == "__main__":
    main()
