"""`python -m longwing`."""

from longwing.cli import main

main()
