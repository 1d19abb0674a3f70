"""`python -m etherdiff`."""

from etherdiff.cli import main

main()
