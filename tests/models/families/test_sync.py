"""What a trainer sends is taken by the samplers, and sampled from: by transformers and by vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_flows.errors import ConfigError, SyncError
from rlhf_flows.generation import GenerationSettings
from rlhf_flows.models import SFTTrainer, TorchPolicy, VLLMPolicy
from rlhf_flows.modules.conversion import Conversion
from rlhf_flows.modules.torch_module import kind_of
from tests.models.families.tiny_families import GPT2_SIZES, VARIANTS, build
from tests.models.remote_policy import RemotePolicy

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0.0, ignore_eos=True)
G = torch.Generator().manual_seed(0)
# Beyond the windows of those that have one.
PROMPTS = [torch.randint(3, 250, (n,), generator=G).tolist() for n in (40, 5, 23)]
QUICK = ("gpt2", "mixtral, window, tied", "mistral, window")
NOT_BY_VLLM = ("qwen2, windows in some layers",)
BY_VLLM = [
    v if v in QUICK else pytest.param(v, marks=pytest.mark.long)
    for v in VARIANTS
    if v not in NOT_BY_VLLM
]


def trainer(folder: Path, *, seed: int, **options: Any) -> SFTTrainer:
    """With weights that are not the folder's."""
    made = SFTTrainer(path=folder, **options)
    made.setup()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return made


def greedy(folder: Path, sender: SFTTrainer, tmp_path: Path) -> list[list[int]]:
    """By plain transformers, without a cache, from an export of the sender."""
    sender.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def check(policy: Any, folder: Path, tmp_path: Path) -> None:
    """Two loads, because the first finds an engine as it was started."""
    for seed in (1, 2):
        sender = trainer(folder, seed=seed)
        expected = torch.tensor(sender.probe_logprobs([PROMPTS[0]]))
        stale = torch.tensor(policy.probe_logprobs([PROMPTS[0]]))
        assert not torch.allclose(stale, expected, atol=0.1)
        policy.load_weights([(name, weight.clone()) for name, weight in sender.named_weights()])
        found = torch.tensor(policy.probe_logprobs([PROMPTS[0]]))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        completions = policy.generate(PROMPTS, seeds=[0, 1, 2], settings=GREEDY)
        assert [list(c.ids) for c in completions] == greedy(folder, sender, tmp_path)


def test_weights_reach_the_sampler_of_transformers(variant: Path, tmp_path: Path) -> None:
    policy = TorchPolicy(path=variant, dtype="float32", generation=GREEDY)
    policy.validate()
    policy.setup()
    check(policy, variant, tmp_path)


def test_weights_in_half_precision_reach_it_too(variant: Path) -> None:
    policy = TorchPolicy(path=variant, dtype="float32")
    policy.setup()
    sender = trainer(variant, seed=1, dtype="bfloat16")
    policy.load_weights(sender.named_weights())
    for (name, found), (_, sent) in zip(
        policy.named_weights(), sender.named_weights(), strict=True
    ):
        assert torch.equal(found, sent.float()), name


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemotePolicy]:
    if not VLLMPolicy.available():
        pytest.skip("vLLM is not installed")
    process = RemotePolicy(tmp_path_factory.mktemp("socket") / "policy")
    yield process
    process.close()


class InParts:
    """Gives a policy its weights three at a time, in memory that is gone after each call."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        given = list(weights)
        with self.receiving_weights([kind_of(n, t) for n, t in given]) as take:  # type: ignore[attr-defined]
            for start in range(0, len(given), 3):
                lent = [(name, tensor.clone()) for name, tensor in given[start : start + 3]]
                take(lent)
                for _, tensor in lent:
                    tensor.fill_(torch.nan)


class PartsVLLMPolicy(InParts, VLLMPolicy):
    receiving_weights = VLLMPolicy._reloading  # its `load_weights` is the other way round


class PartsTorchPolicy(InParts, TorchPolicy):
    receiving_weights = TorchPolicy._filling


@pytest.mark.parametrize("name", BY_VLLM)
def test_weights_reach_vllm(
    name: str, remote: RemotePolicy, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(name)
    remote.start(PartsVLLMPolicy, path=folder, dtype="float32", generation=GREEDY)
    check(remote, folder, tmp_path)
    remote.start(VLLMPolicy, path=folder, dtype="float32", generation=GREEDY)
    check(remote, folder, tmp_path)


def test_weights_reach_the_sampler_of_transformers_in_parts(variant: Path, tmp_path: Path) -> None:
    policy = PartsTorchPolicy(path=variant, dtype="float32", generation=GREEDY)
    policy.setup()
    check(policy, variant, tmp_path)


def test_what_vllm_does_not_run_is_refused_with_the_way_out(
    remote: RemotePolicy, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    # vLLM says so by assertions, one of them without a word.
    odd = build(tmp_path, "GPT2LMHeadModel", {**GPT2_SIZES, "reorder_and_upcast_attn": True})
    for folder in (odd, *map(folder_of, NOT_BY_VLLM)):
        with pytest.raises(ConfigError, match=r"vLLM refuses the model.*use TorchPolicy"):
            remote.start(VLLMPolicy, path=folder, dtype="float32", generation=GREEDY)


def mixtral(folder_of: Callable[[str], Path]) -> tuple[SFTTrainer, Conversion]:
    made = trainer(folder_of("mixtral"), seed=1)
    assert made.conversion is not None
    return made, made.conversion


def test_experts_are_sent_one_by_one_and_put_together_again(
    folder_of: Callable[[str], Path],
) -> None:
    made, conversion = mixtral(folder_of)
    for name, tensor in made.model.state_dict().items():
        parts = conversion.split(name, tensor)
        assert torch.equal(conversion.merge(name, [part for _, part in parts]), tensor)
        assert all(
            p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for _, p in parts
        ), "a copy would double the memory of a sync"
    both = made.model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    sent = dict(made.named_weights())
    expert = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(
        torch.cat([sent[f"{expert}.w1.weight"], sent[f"{expert}.w3.weight"]]), both[2]
    )


def test_an_expert_that_is_missing_is_named_as_in_the_checkpoint(
    folder_of: Callable[[str], Path],
) -> None:
    made, _ = mixtral(folder_of)
    before = made.probe_logprobs([PROMPTS[0]])
    other = trainer(folder_of("mixtral"), seed=2)
    expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(SyncError, match=rf"{expert} is missing\. Nothing was changed"):
        made.load_weights((n, w) for n, w in other.named_weights() if n != expert)
    assert made.probe_logprobs([PROMPTS[0]]) == before
