"""`python -m gemoe_ds` is `gemoe`."""

from gemoe_ds.cli.main import main

main()
