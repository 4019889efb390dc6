"""`python -m eosin.cli`."""

from eosin.cli import main

main()
