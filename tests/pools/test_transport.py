"""Weights in buckets: cut, packed, checked, put together again. No Ray."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_flows.errors import SyncError
from rlhf_flows.pools.digest import DigestedTensor, digest_weights
from rlhf_flows.pools.transport import cut, pack, unpack
from tests.pools.specs import manifest_of


def weights_of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(33, 7, generator=generator),
        "half": torch.randn(129, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.arange(5),
        "slice": torch.randn(8, 8, generator=generator)[:, ::2],
        "eight": torch.randn(3, generator=generator).half(),
    }


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1 << 20])
def test_weights_arrive_as_they_were_sent_in_any_number_of_buckets(bucket_bytes: int) -> None:
    weights = weights_of_all_kinds()
    manifest = manifest_of(weights, 2, bucket_bytes)
    buckets = [pickle.loads(pickle.dumps(b)) for b in pack(weights.items(), manifest)]
    arrived = dict(itertools.chain(*(unpack(bucket, manifest) for bucket in buckets)))
    assert list(arrived) == list(weights)
    for name, tensor in weights.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor), name
    assert (len(buckets) == 1) == (bucket_bytes > 10_000)
    assert [b.manifest is None for b in buckets] == [i > 0 for i in range(len(buckets))]
    assert manifest.digest == digest_weights(weights.items())


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 64))
def test_a_bucket_is_full_or_has_one_tensor_and_none_is_left_out(
    sizes: list[int], bucket_bytes: int
) -> None:
    tensors = [DigestedTensor("t", "uint8", (size,), b"") for size in sizes]
    buckets = cut(tensors, bucket_bytes)
    assert [i for bucket in buckets for i in bucket] == list(range(len(sizes)))
    for bucket in buckets:
        assert len(bucket) <= 1 or sum(sizes[i] for i in bucket) <= bucket_bytes
    for bucket, after in itertools.pairwise(buckets):
        assert sum(sizes[i] for i in bucket) + sizes[after[0]] > bucket_bytes


def test_a_bucket_has_the_bytes_of_the_weights_themselves() -> None:
    weights = {"w": torch.arange(4.0)}
    (bucket,) = pack(weights.items(), manifest_of(weights, 1, 1 << 20))
    weights["w"][0] = 7
    assert bucket.parts[0].view(np.float32)[0] == 7


def test_one_wrong_bit_is_refused_with_its_whole_bucket() -> None:
    weights = weights_of_all_kinds()
    manifest = manifest_of(weights, 2, 300)
    first, second, *_ = pack(weights.items(), manifest)
    parts = [part.copy() for part in first.parts]
    parts[0][5] ^= 1
    with pytest.raises(SyncError, match=r"embed of version 2 arrived with other bytes .*1 of"):
        unpack(replace(first, parts=tuple(parts)), manifest)
    unpack(second, manifest)


def test_other_weights_than_were_digested_are_not_sent_and_all_are_gone_through() -> None:
    weights = weights_of_all_kinds()
    manifest = manifest_of(weights, 2, 300)
    for change in ({"half": torch.zeros(129)}, {"half": torch.zeros(128).bfloat16()}):
        rest = iter((weights | change).items())
        with pytest.raises(SyncError, match=r"half .* came, expected .*'half', 'bfloat16', \(129"):
            list(pack(rest, manifest))
        assert next(rest, None) is None
    short = list(weights.items())[:-1]
    with pytest.raises(SyncError, match=r"nothing \(\) came, expected \('eight'"):
        list(pack(short, manifest))
