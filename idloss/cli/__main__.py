"""`python -m idloss.cli`."""

from idloss.cli import main

main()
