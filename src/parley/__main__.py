"""`python -m parley`, as launchers start it: `torchrun --nproc-per-node 2 -m parley train run.yaml`."""

from parley.cli.main import main

main()
