"""From an engine's description to a running attempt, the cheap checks first.

In this order: trace the flows, check modules and data in this process (`checks`), open the store
and claim the run's name (`claims`), see that it did not die too often (`deaths`), connect to Ray
and open the pools (`placement`), scan what is there and run what is missing (`running`), until it
is done or stopped from outside (`stopping`). Whatever a user can get wrong is said before the first
actor starts.
"""

from rlhf_flows.attempt.checks import check
from rlhf_flows.attempt.claims import check_store, claim_run, open_probed_store
from rlhf_flows.attempt.description import (
    Checked,
    Description,
    Environment,
    Evaluator,
    Part,
    Trainer,
)
from rlhf_flows.attempt.names import fill_in, is_template, named_by_flow_run, new_run_name
from rlhf_flows.attempt.running import run_as_flow
from rlhf_flows.attempt.stopping import without_abort

__all__ = [
    "Checked",
    "Description",
    "Environment",
    "Evaluator",
    "Part",
    "Trainer",
    "check",
    "check_store",
    "claim_run",
    "fill_in",
    "is_template",
    "named_by_flow_run",
    "new_run_name",
    "open_probed_store",
    "run_as_flow",
    "without_abort",
]
