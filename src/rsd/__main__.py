"""`python -m rsd`: the `rsd` command where the package is on the path but not installed."""

from rsd.cli import main

main()
