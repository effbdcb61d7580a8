"""``python -m slimcli`` is ``slim``."""

from slimcli.cli import main

main()
