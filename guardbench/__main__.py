"""`python -m guardbench`."""

from guardbench.cli import main

main()
