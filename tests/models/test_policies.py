"""What every policy promises, whatever samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_flows.errors import DataError, SyncError
from rlhf_flows.generation import Completion, GenerationSettings
from rlhf_flows.models.samplers import policy_class
from rlhf_flows.models.sampling import processed_logprobs
from rlhf_flows.models.tiny import build_tiny_qwen2
from rlhf_flows.models.vllm_policy import VLLMPolicy
from tests.models.remote_policy import RemotePolicy

SAMPLERS = ["transformers", *(["vllm"] if VLLMPolicy.available() else [])]
MAX_MODEL_LEN = 64


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose next tokens are far from equally likely."""
    folder = build_tiny_qwen2(
        tmp_path_factory.mktemp("model"), hidden_size=64, num_layers=2, max_position_embeddings=64
    )
    model = load(folder)
    shake(model, seed=1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def shake(model: Any, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two layers, 32 wide, with a token per byte: what trainers are tested on."""
    return build_tiny_qwen2(tmp_path_factory.mktemp("tiny"), hidden_size=32, num_layers=2)


@pytest.fixture
def model(model_folder: Path) -> Any:
    return load(model_folder)


@pytest.fixture
def shaken() -> Callable[[Any], Any]:
    """Changes all weights of a model."""

    def change(model: Any) -> Any:
        shake(model, seed=2)
        return model

    return change


@pytest.fixture(scope="session", params=SAMPLERS)
def started(
    request: pytest.FixtureRequest,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RemotePolicy]:
    socket = tmp_path_factory.mktemp("socket") / "policy"
    remote = RemotePolicy(socket)
    remote.start(
        policy_class(request.param),
        path=model_folder,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        generation=GenerationSettings(max_new_tokens=8, temperature=0.7, top_p=0.9),
        eval_generation=GenerationSettings(max_new_tokens=4, temperature=0.0),
    )
    yield remote
    remote.close()


@pytest.fixture
def policy(started: RemotePolicy, model_folder: Path) -> RemotePolicy:
    """A policy with the folder's weights, by each sampler that is installed."""
    started.load_weights(weights(load(model_folder)))
    return started


GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [
    torch.randint(3, 250, (n,), generator=GENERATOR).tolist() for n in (5, 40, 12, 33, 7, 1, 20, 50)
]
SIBLINGS = [p for p in PROMPTS for _ in range(4)]
SEEDS = list(range(100, 100 + len(SIBLINGS)))
GREEDY = GenerationSettings(max_new_tokens=8, temperature=0.0, ignore_eos=True)
SAMPLED = GenerationSettings(max_new_tokens=8, temperature=0.7, top_p=0.9)


def sample(policy: Any, settings: GenerationSettings, **changed: Any) -> list[Completion]:
    arguments = {"prompt_ids": SIBLINGS, "seeds": SEEDS, **changed}
    return policy.generate(arguments["prompt_ids"], seeds=arguments["seeds"], settings=settings)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def teacher_forced(
    model: Any, prompt: list[int], completion: Completion, settings: GenerationSettings
) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion.ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(completion.ids)[:, None]
    return processed_logprobs(logits, settings).gather(-1, chosen)[:, 0]


def weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, w.detach()) for name, w in model.named_parameters()]


def test_greedy_completions_are_those_of_the_plain_model(policy: Any, model: Any) -> None:
    completions = sample(policy, GREEDY, prompt_ids=PROMPTS, seeds=SEEDS[: len(PROMPTS)])
    assert [list(c.ids) for c in completions] == [greedy(model, p, 8) for p in PROMPTS]
    assert {c.finish_reason for c in completions} == {"length"}


def test_the_same_call_gives_the_same_bits_whatever_came_before(policy: Any) -> None:
    first = sample(policy, SAMPLED)
    sample(policy, GREEDY, prompt_ids=SIBLINGS[5:17], seeds=SEEDS[5:17])
    assert sample(policy, SAMPLED) == first


def test_siblings_differ_by_their_seeds_alone(policy: Any) -> None:
    completions = sample(policy, SAMPLED, prompt_ids=[PROMPTS[1]] * 6, seeds=[1, 2, 3, 1, 2, 3])
    ids = [tuple(c.ids) for c in completions]
    assert ids[:3] == ids[3:]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=8),
        SAMPLED,
        GenerationSettings(max_new_tokens=8, temperature=1.3, top_k=7),
        GenerationSettings(max_new_tokens=8, temperature=0.9, min_p=0.2),
        GREEDY,
    ],
    ids=["plain", "top_p", "top_k", "min_p", "greedy"],
)
def test_behaviour_logprobs_are_of_the_distribution_drawn_from(
    policy: Any, model: Any, settings: GenerationSettings
) -> None:
    for prompt, completion in zip(SIBLINGS, sample(policy, settings), strict=True):
        expected = teacher_forced(model, prompt, completion, settings)
        found = torch.tensor(completion.logprobs)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_completion_ends_with_its_end_token(policy: Any, model: Any) -> None:
    third = [greedy(model, p, 3)[2] for p in PROMPTS]
    settings = GREEDY.model_copy(update={"stop_token_ids": (third[0],)})
    first = sample(policy, settings, prompt_ids=PROMPTS[:1], seeds=[0])[0]
    assert first.finish_reason == "stop"
    assert first.ids[-1] == third[0]
    assert third[0] not in list(first.ids)[:-1]


def test_a_stop_string_ends_a_completion_and_is_cut_from_its_text(policy: Any) -> None:
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True)
    batch = {"prompt_ids": [torch.tensor(PROMPTS[0])] * 8, "seed": torch.arange(8)}
    whole = policy._complete(batch, settings)["completion"]
    letter = next(c for c in "".join(whole) if c.isascii() and c.isprintable())
    ended = policy._complete(batch, settings.model_copy(update={"stop": (letter,)}))
    assert ended["completion"] == [text.split(letter)[0] for text in whole]
    for text, reason, ids in zip(whole, ended["finish_reason"], ended["response_ids"], strict=True):
        assert reason == ("stop" if letter in text else "length")
        assert len(ids) == 40 or reason == "stop"


def test_forward_step_adds_its_columns_and_keeps_the_others(policy: Any) -> None:
    batch = {
        "prompt_ids": [torch.tensor(p) for p in PROMPTS],
        "seed": torch.arange(len(PROMPTS)),
        "answer": list("abcdefgh"),
    }
    out = policy.forward_step(batch)
    assert out["answer"] == batch["answer"]
    for ids, logprobs in zip(out["response_ids"], out["behaviour_logprobs"], strict=True):
        assert ids.dtype == torch.int64
        assert logprobs.dtype == torch.float32
        assert 1 <= len(ids) == len(logprobs) <= 8
    assert all(isinstance(text, str) for text in out["completion"])
    assert set(out["finish_reason"]) <= {"stop", "length"}


def test_a_dense_column_of_prompts_is_taken_like_a_ragged_one(policy: Any) -> None:
    dense = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    seeds = torch.tensor([3, 4])
    a = policy.forward_step({"prompt_ids": dense, "seed": seeds})
    b = policy.forward_step({"prompt_ids": list(dense), "seed": seeds})
    assert a["completion"] == b["completion"]


def test_evaluation_samples_by_its_own_settings(policy: Any, model: Any) -> None:
    batch = {"prompt_ids": [torch.tensor(p) for p in PROMPTS], "seed": torch.arange(len(PROMPTS))}
    for ids, prompt in zip(policy.eval_step(batch)["response_ids"], PROMPTS, strict=True):
        assert ids.tolist() == greedy(model, prompt, 4)[: len(ids)]


def test_new_weights_generate_as_the_new_model(policy: Any, model: Any, shaken: Any) -> None:
    old = [greedy(model, p, 8) for p in PROMPTS]
    new_model = shaken(model)
    policy.load_weights(weights(new_model))
    new = [greedy(new_model, p, 8) for p in PROMPTS]
    assert new != old
    completions = sample(policy, GREEDY, prompt_ids=PROMPTS, seeds=SEEDS[: len(PROMPTS)])
    assert [list(c.ids) for c in completions] == new


def test_weights_of_another_precision_are_taken(policy: Any, model: Any) -> None:
    half = [(name, w.to(torch.bfloat16)) for name, w in weights(model)]
    policy.load_weights(half)
    model.load_state_dict(dict(half), strict=False)
    completions = sample(policy, GREEDY, prompt_ids=PROMPTS, seeds=SEEDS[: len(PROMPTS)])
    assert [list(c.ids) for c in completions] == [greedy(model, p, 8) for p in PROMPTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[1:], "missing"),
        (lambda w: [*w, ("extra.weight", torch.zeros(2))], r"extra\.weight"),
        (lambda w: [(w[0][0], w[0][1][:-1]), *w[1:]], "embed_tokens"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_wrong_weights_are_refused_and_nothing_changes(
    policy: Any, model: Any, shaken: Any, change: Any, message: str
) -> None:
    before = sample(policy, SAMPLED)
    with pytest.raises(SyncError, match=message):
        policy.load_weights(change(weights(shaken(model))))
    assert sample(policy, SAMPLED) == before


def test_probe_logprobs_are_those_of_the_plain_model(policy: Any, model: Any) -> None:
    sequences = [p for p in PROMPTS if len(p) > 1]
    for ids, found in zip(sequences, policy.probe_logprobs(sequences), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "has 0 tokens"), ([5] * 57, "has 57 tokens.*1 to 56")]
)
def test_a_prompt_without_room_is_refused(policy: Any, prompt: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample(policy, SAMPLED, prompt_ids=[[5, 6], prompt], seeds=[0, 1])


def test_a_batch_without_seeds_is_refused(policy: Any) -> None:
    with pytest.raises(DataError, match="'seed'"):
        policy.forward_step({"prompt_ids": [torch.tensor([5])]})


def test_no_prompts_give_no_completions(policy: Any) -> None:
    out = policy.forward_step({"prompt_ids": [], "seed": torch.zeros(0, dtype=torch.int64)})
    assert out["response_ids"] == out["completion"] == []


def test_more_prompt_tokens_than_one_pass_takes_change_nothing(policy: Any) -> None:
    # 12 800 tokens of prompts without a common start, far beyond what an engine reads at once.
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 250, (256, 50), generator=g).tolist()
    together = sample(policy, SAMPLED, prompt_ids=prompts, seeds=list(range(256)))
    few = sample(policy, SAMPLED, prompt_ids=prompts[:8], seeds=list(range(8)))
    assert [c.ids for c in together[:8]] == [c.ids for c in few]
    assert sample(policy, SAMPLED, prompt_ids=prompts, seeds=list(range(256))) == together


@pytest.mark.parametrize("started", [s for s in SAMPLERS if s == "vllm"], indirect=True)
def test_a_load_that_fails_half_way_ends_the_use_of_an_engine(
    policy: RemotePolicy, model: Any
) -> None:
    """The last test of this policy: there is no way back."""
    # A tensor without data has the right shape, and fails where it is copied.
    broken = [(name, w.to("meta") if i == 3 else w) for i, (name, w) in enumerate(weights(model))]
    with pytest.raises(SyncError, match="failed while it took new weights"):
        policy.load_weights(broken)
    with pytest.raises(SyncError, match="replace this replica"):
        sample(policy, SAMPLED)
    with pytest.raises(SyncError, match="replace this replica"):
        policy.load_weights(weights(model))
