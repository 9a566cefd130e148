"""`python -m rlhf_flows.cli`."""

from rlhf_flows.cli import main

main()
