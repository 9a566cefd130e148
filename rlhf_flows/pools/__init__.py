"""Actor pools: the models live here, across episodes, attempts, flow runs. The only room with Ray.

A `Worker` holds one rank of one module; a `Pool` is the replicas of a module, seen from the flow;
`connect` reaches the cluster. Data passes between workers and the store, never through the flow.
"""

from rlhf_flows.pools.actors import Replica
from rlhf_flows.pools.cluster import Cluster, connect, watch_head
from rlhf_flows.pools.delivery import NO_VERSION, Receiver, deliver
from rlhf_flows.pools.messages import (
    CheckpointRecord,
    ForwardCall,
    NodeReport,
    PoolSpec,
    Source,
    StoredShard,
    TrainCall,
    TrainRows,
    WorkerState,
)
from rlhf_flows.pools.pool import Pool
from rlhf_flows.pools.sharded_folders import joined

__all__ = [
    "NO_VERSION",
    "CheckpointRecord",
    "Cluster",
    "ForwardCall",
    "NodeReport",
    "Pool",
    "PoolSpec",
    "Receiver",
    "Replica",
    "Source",
    "StoredShard",
    "TrainCall",
    "TrainRows",
    "WorkerState",
    "connect",
    "deliver",
    "joined",
    "watch_head",
]
