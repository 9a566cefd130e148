"""Whether what a family promises is true, tried on a model folder.

The decision here: the other side of every comparison is plain `transformers`, one text at a time,
with eager attention, in float32. What is compared is what training, scoring, export and sync rest
on, so a family that passes can be used by every role here.

Letters: T response tokens of all samples, flat, in sample order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from rlhf_flows.errors import ConfigError, SyncError
from rlhf_flows.models.causal_lm import architecture_of, check_model_folder, load_causal_lm
from rlhf_flows.models.families.family import Family, conversion_of, family_of
from rlhf_flows.models.response_logprobs import Layout, response_logprobs, window_of
from rlhf_flows.models.scalar_model import load_scalar_model, response_scores
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.torch_module import TorchModule

__all__ = ["FamilyReport", "check_family"]

_EXACT_KINDS = {"full_attention", "sliding_attention"}
"""Kinds of attention layers that the shared-prefix layout, or `window_of`, knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReport:
    family: str
    architecture: str
    differences: Mapping[str, float]
    """What was compared, and the largest difference found: of logprobs and scores absolute, of
    gradients in parts of the largest gradient."""


class _Samples(NamedTuple):
    prompts: list[Tensor]
    responses: list[Tensor]
    groups: list[int]


def check_family(path: str | Path, *, tolerance: float = 1e-4) -> FamilyReport:
    """Compares what is computed here from a model folder with plain `transformers`.

    Logprobs and their gradients in every layout that the family has, scores of the scalar head
    likewise, names and shapes of the weights, and the model after an export and back. Holds the
    model three times in float32: take a small one, of the same configuration but for its sizes.

    Args:
        path: a Hugging Face folder of a causal model of the family, with its tokenizer.
        tolerance: largest difference that is taken for rounding.

    Raises:
        ConfigError: the family is not known, or something differs; every difference is named.
    """
    folder = check_model_folder(path)
    architecture = architecture_of(folder)
    family = family_of(architecture)
    logging.disable_progress_bar()
    differences: dict[str, float] = {}
    problems = list(_weight_problems(folder))
    differences |= _causal_differences(folder, family)
    if family.scalar is not None:
        differences |= _scalar_differences(folder, family)
    problems += [
        f"{what} differ by up to {found:.1e}"
        for what, found in differences.items()
        if not found <= tolerance
    ]
    if problems:
        raise ConfigError(
            f"the model in {str(path)!r} does not do what its family {family.name!r} promises:"
            f" {'; '.join(problems)}. Where only the shared-prefix layout differs, register it with"
            " shared_prefix=False; where names or shapes differ, with a conversion; where padded"
            " logprobs differ, too, this package cannot train it (docs/families.md)"
        )
    return FamilyReport(family=family.name, architecture=architecture, differences=differences)


# ---- logprobs and scores ----------------------------------------------------------------------


def _causal_differences(folder: HFFolder, family: Family) -> dict[str, float]:
    plain = AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    own = load_causal_lm(folder.path)

    def expected(samples: _Samples) -> Tensor:
        flat = []
        for prompt, response in zip(samples.prompts, samples.responses, strict=True):
            text = torch.cat([prompt, response])
            logits = plain(input_ids=text[None], use_cache=False).logits[0]  # [p + r, V]
            logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            flat.append(logprobs.gather(-1, response[:, None])[:, 0])
        return torch.cat(flat)

    def found(samples: _Samples, layout: Layout) -> Tensor:
        return response_logprobs(own, *samples, layout=layout).logprobs

    return _differences("logprobs", family, plain, own, expected, found)


def _scalar_differences(folder: HFFolder, family: Family) -> dict[str, float]:
    own = load_scalar_model(folder.path, head_init="small")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the head, which is set below
    try:
        plain = AutoModelForSequenceClassification.from_pretrained(
            folder.path,
            num_labels=1,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
        ).eval()
    finally:
        logging.set_verbosity(verbosity)
    plain.score.load_state_dict(own.score.state_dict())

    def expected(samples: _Samples) -> Tensor:
        flat = []
        for prompt, response in zip(samples.prompts, samples.responses, strict=True):
            text = torch.cat([prompt, response])[None]
            hidden = plain.base_model(input_ids=text, use_cache=False).last_hidden_state[0]
            flat.append(plain.score(hidden)[len(prompt) - 1 : -1, 0])
        return torch.cat(flat)

    def found(samples: _Samples, layout: Layout) -> Tensor:
        return response_scores(own, *samples, layout=layout)

    return _differences("scores", family, plain, own, expected, found)


def _differences(
    what: str,
    family: Family,
    plain: nn.Module,
    own: Any,
    expected: Callable[[_Samples], Tensor],  # [T]
    found: Callable[[_Samples, Layout], Tensor],  # [T]
) -> dict[str, float]:
    largest: dict[str, tuple[float, str]] = {}
    for samples in _all_samples(own.config):
        longest = max(
            len(p) + len(r) for p, r in zip(samples.prompts, samples.responses, strict=True)
        )
        shared = family.shared_prefix and longest <= window_of(own.config)
        layouts: Sequence[Layout] = ("shared_prefix", "padded") if shared else ("padded",)
        right = expected(samples)
        right_gradients = _gradients(plain, right)
        for layout in layouts:
            values = found(samples, layout)
            name, gradient = _gradient_difference(_gradients(own, values), right_gradients)
            for key, difference, where in (
                (f"{what} ({layout})", float((values - right).detach().abs().max()), ""),
                (f"gradients of {what} ({layout})", gradient, f" at {name}"),
            ):
                largest[key] = max((difference, where), largest.get(key, (0.0, "")))
    return {f"{key}{where}": difference for key, (difference, where) in largest.items()}


def _all_samples(config: Any) -> Iterator[_Samples]:
    """Short texts, and some longer than small sliding windows; siblings and single samples."""
    g = torch.Generator().manual_seed(1)
    for shapes in (
        [(3, [4, 1, 7]), (9, [2, 2]), (1, [5, 3, 1]), (9, [7])],
        [(30, [4, 9]), (2, [30, 1])],
    ):
        samples = _Samples([], [], [])
        for group, (length, responses) in enumerate(shapes):
            prompt = torch.randint(config.vocab_size, (length,), generator=g)
            for r in responses:
                samples.prompts.append(prompt)
                samples.responses.append(torch.randint(config.vocab_size, (r,), generator=g))
                samples.groups.append(group)
        yield samples


def _gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (weights * values).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _gradient_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[str, float]:
    """The parameter whose gradient differs most, and by which part of the largest gradient."""
    if missing := found.keys() ^ expected.keys():
        return sorted(missing)[0], float("inf")
    scale = max(float(g.abs().max()) for g in expected.values())
    parts = {n: float((found[n] - g).abs().max()) / scale for n, g in expected.items()}
    worst = max(parts, key=lambda n: parts[n])
    return worst, parts[worst]


# ---- weights ----------------------------------------------------------------------------------


def _weight_problems(folder: HFFolder) -> Iterator[str]:
    module = TorchModule("checked")
    module.model = load_causal_lm(folder.path)
    module.conversion = conversion_of(module.model)
    kinds = set(getattr(module.model.config, "layer_types", None) or ()) - _EXACT_KINDS
    if kinds and family_of(type(module.model).__name__).shared_prefix:
        yield f"its layers are of kinds that the shared-prefix layout does not know: {kinds}"
    try:
        folder.check_weights(module.named_weights())
    except SyncError as e:
        yield f"names or shapes of its weights are not the checkpoint's ({e})"
        return
    sent = {name: tensor.clone() for name, tensor in module.named_weights()}
    with tempfile.TemporaryDirectory() as exported:
        module.save_pretrained(Path(exported))
        again = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.load_weights(sent.items())
    plain = AutoModelForCausalLM.from_pretrained(
        folder.path, dtype=torch.float32, local_files_only=True
    )
    for what, other in (("an export", again), ("sending them", module.model)):
        state = other.state_dict()
        changed = [n for n, w in plain.state_dict().items() if not torch.equal(state[n], w)]
        if changed:
            yield f"{len(changed)} weights are others after {what} (first {changed[0]!r})"
