"""`python -m diffaccel` is `diffaccel`."""

from .cli import main

main()
