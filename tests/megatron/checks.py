"""What ranks check together; each function runs on every rank of a test (`ranks.py`).

The other side of every comparison is plain `transformers`, one text at a time, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_flows.models.megatron.causal_lm import MegatronCausalLM, load_megatron_causal_lm
from rlhf_flows.models.megatron.scalar import load_megatron_scalar
from rlhf_flows.modules.megatron.cpu import calling_megatron
from rlhf_flows.modules.megatron.model import hidden_states, packed_texts
from rlhf_flows.modules.megatron.topology import Topology, model_parallel_groups
from tests.megatron.ranks import COLLECTIVE_TIMEOUT_S


@contextmanager
def loaded(folder: str, topology: Topology, **kwargs: Any) -> Iterator[MegatronCausalLM]:
    """With `head_init` a model with a scalar head."""
    load = load_megatron_scalar if "head_init" in kwargs else load_megatron_causal_lm
    with model_parallel_groups(topology, timeout_s=COLLECTIVE_TIMEOUT_S):
        yield load(folder, topology, **kwargs)


def plain_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def texts_of(vocabulary_size: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(vocabulary_size, (n,), generator=g) for n in (5, 19, 1, 12)]


def packed_logits(model: MegatronCausalLM, texts: Sequence[Tensor]) -> Tensor | None:
    """[T, V] on the last stage, by each stage in turn; None on the others."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    topology = model.topology
    multiple = topology.tensor_parallel if topology.sequence_parallel else 1
    packed, total = packed_texts([len(t) for t in texts], multiple=multiple)
    tokens = torch.nn.functional.pad(torch.cat(list(texts)), (0, total - sum(map(len, texts))))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    last = topology.pipeline_parallel - 1
    before, after = (
        parallel_state.get_pipeline_model_parallel_prev_rank() if stage else None,
        parallel_state.get_pipeline_model_parallel_next_rank() if stage < last else None,
    )
    share = total // multiple
    (decoder,) = model.decoders
    with torch.no_grad(), calling_megatron("cpu"):
        if before is not None:
            received = torch.empty(share, 1, model.shape.width)
            torch.distributed.recv(received, before)
            decoder.set_input_tensor(received)
        hidden = hidden_states(decoder, tokens[None], packed)  # [share, 1, D]
        if after is not None:
            torch.distributed.send(hidden.contiguous(), after)
            return None
        if topology.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        logits = gather_from_tensor_model_parallel_region(hidden @ decoder.head_weight().T)
        return logits[: sum(map(len, texts)), 0, : model.shape.vocabulary_size]


def logits_and_weights(folder: str, topologies: Sequence[Topology]) -> list[dict[str, Any]]:
    """For each topology: the largest difference of logits (None where the rank has none), and
    names of weights that come out other than they went in.
    """
    plain = plain_model(folder)
    stored = plain.state_dict()
    if plain.config.tie_word_embeddings:
        stored = {n: w for n, w in stored.items() if n != "lm_head.weight"}
    texts = texts_of(plain.config.vocab_size)
    with torch.no_grad():
        expected = torch.cat([plain(text[None]).logits[0] for text in texts])
    found = []
    for topology in topologies:
        with loaded(folder, topology) as model:
            logits = packed_logits(model, texts)
            weights = list(model.named_weights())
        given = dict(weights)
        wrong = [n for n in stored if n not in given or not torch.equal(stored[n], given[n])]
        found.append(
            {
                "logits": None if logits is None else float((logits - expected).abs().max()),
                "wrong": wrong + [n for n in given if n not in stored],
                "order": [n for n, _ in weights],
            }
        )
    return found


def logits_with_plain_packing(folder: str) -> float:
    """The difference of logits with queries, keys and values of all heads one after the other."""
    from unittest.mock import patch

    from rlhf_flows.modules.megatron.conversion import MegatronConversion

    plain = plain_model(folder)
    texts = texts_of(plain.config.vocab_size)
    with torch.no_grad():
        expected = torch.cat([plain(text[None]).logits[0] for text in texts])
    with (
        patch.object(MegatronConversion, "merge", lambda self, name, parts: torch.cat(list(parts))),
        loaded(folder, Topology()) as model,
    ):
        logits = packed_logits(model, texts)
    assert logits is not None
    return float((logits - expected).abs().max())


def groups_of_topology(topology: Topology) -> dict[str, list[int]]:
    """Ranks of this rank's groups, by what they share; and that there are none afterwards."""
    from megatron.core import parallel_state

    with model_parallel_groups(topology, timeout_s=COLLECTIVE_TIMEOUT_S):
        groups = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
        }
        found = {n: torch.distributed.get_process_group_ranks(g) for n, g in groups.items()}
    assert not parallel_state.model_parallel_is_initialized()
    return found


def refused_topology(topology: Topology) -> str:
    from rlhf_flows.errors import ConfigError

    try:
        with model_parallel_groups(topology, timeout_s=COLLECTIVE_TIMEOUT_S):
            return "taken"
    except ConfigError as refusal:
        return str(refusal)


def shared_vocabulary() -> list[float]:
    """Differences of logprobs, entropies and both gradients from plain log_softmax."""
    from torch.distributed import get_rank, get_world_size

    from rlhf_flows.models.megatron.logprobs import vocabulary_parallel_logprobs

    rank, size = get_rank(), get_world_size()
    torch.manual_seed(2)
    vocabulary_size, rows = 30, 64 // size
    hidden = torch.randn(7, 5, requires_grad=True)
    whole = torch.randn(vocabulary_size, 5, requires_grad=True)
    targets = torch.randint(vocabulary_size, (7,))
    own = torch.cat([whole.detach(), torch.ones(64 - vocabulary_size, 5)])
    mine = own[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    scored = vocabulary_parallel_logprobs(
        hidden,
        mine,
        targets,
        vocabulary_size=vocabulary_size,
        group=torch.distributed.group.WORLD,
        temperature=0.8,
        entropy=True,
    )
    weights = torch.randn(7)
    found = torch.autograd.grad((scored.logprobs * weights).sum(), (hidden, mine))
    torch.distributed.all_reduce(found[0])  # as the mapping below it does

    plain = ((hidden @ whole.T) / 0.8).log_softmax(-1)
    expected = plain.gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * weights).sum(), (hidden, whole))
    padded = torch.cat([gradients[1], torch.zeros(64 - vocabulary_size, 5)])
    assert scored.entropy is not None
    pairs = [
        (scored.logprobs, expected),
        (scored.entropy, -(plain.exp() * plain).sum(-1)),
        (found[0], gradients[0]),
        (found[1], padded[rank * rows : (rank + 1) * rows]),
    ]
    return [float((a - b).abs().max()) for a, b in pairs]


def groups_that_one_rank_does_not_make() -> str:
    """Rank 0 makes groups with a short timeout, rank 1 does not; what rank 0 says."""
    from rlhf_flows.errors import WaitTimeoutError

    if torch.distributed.get_rank() == 1:
        return ""
    try:
        with model_parallel_groups(Topology(world_size=2, tensor_parallel=2), timeout_s=2.0):
            return "made"
    except WaitTimeoutError as error:
        return str(error)


def exported_folder(folder: str, topology: Topology, to: str, max_file_bytes: int) -> None:
    """A Hugging Face folder of a model in bfloat16, which rank 0 writes as weights come."""
    from pathlib import Path

    from rlhf_flows.modules.hf_export import copy_description, write_weights

    with loaded(folder, topology, dtype="bfloat16") as model:
        weights = model.named_weights()
        if torch.distributed.get_rank() == 0:
            copy_description(Path(folder), Path(to), dtype="bfloat16")
            write_weights(weights, Path(to), max_file_bytes=max_file_bytes)
        for _ in weights:
            pass


def refused_weights(folder: str) -> str:
    from rlhf_flows.errors import ConfigError

    try:
        with loaded(folder, Topology()):
            return "taken"
    except ConfigError as refusal:
        return str(refusal)
