"""`python -m tradebook` is the command `tradebook`."""

from tradebook.ops.cli import main

main()
