"""What only a running worker can notice: wrong returns, wrong data, weights that do not fit.

One process drives the workers, as no actor is needed to be wrong. Each error names module, method
and where in the run, what was found, and what to do; nothing of what failed is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn

from rlhf_flows.data import to_arrow
from rlhf_flows.errors import ConfigError, NonFiniteError, RlhfFlowsError, SyncError, UserError
from rlhf_flows.modules import BaseModule, ModuleContext, TorchModule
from rlhf_flows.pools.messages import RelayCall
from rlhf_flows.pools.worker import Worker
from tests.pools.specs import ROWS, rollout_call, spec_of, train_call
from tests.toys import Rows, ToyPolicy, ToyReward, ToyTrainer


def worker_of(module: BaseModule, store: Path, **context: Any) -> Worker:
    worker = Worker(spec_of(module, store, context=ModuleContext(seed=3, **context)))
    worker.setup(1)
    return worker


def refused(error: type[RlhfFlowsError], work: Callable[[], Any], *words: str) -> None:
    with pytest.raises(error) as raised:
        work()
    for word in words:
        assert word in str(raised.value)
    again = cloudpickle.loads(cloudpickle.dumps(raised.value))
    assert str(again) == str(raised.value)


# ---- what forward_step returns ----------------------------------------------------------------


class Returns(ToyReward):
    """A reward whose forward_step is the function it was given."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        super().__init__(name)
        self.function = function

    def forward_step(self, data: Any, iteration: int = 0) -> Any:
        return self.function(data)


def swapped(data: Any) -> Any:
    return {"sample_id": data["sample_id"][::-1], "reward": torch.ones(8)}


def sliced(data: Any) -> Any:
    return {"reward": torch.ones(8), "exact": torch.ones(8)[:7]}


RETURNS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "a list": (lambda d: [1.0] * 8, ["it returned a list", "expected a dict of columns"]),
    "a tensor": (lambda d: torch.ones(8), ["it returned a Tensor", "expected a dict of columns"]),
    "too few rows": (lambda d: {"reward": torch.ones(7)}, ["7 rows for 8", "for each sample"]),
    "too many rows": (lambda d: {"reward": torch.ones(16)}, ["16 rows for 8", "for each sample"]),
    "one reward for all": (
        lambda d: {"reward": torch.tensor(0.5)},
        ["column 'reward' is a tensor without dimensions", "one value for each sample"],
    ),
    "a number": (lambda d: {"reward": 0.5}, ["column 'reward' is a float", "tensor or a list"]),
    "an array": (lambda d: {"reward": np.ones(8)}, ["column 'reward' is a ndarray", "tensor or"]),
    "columns that differ": (sliced, ["column 'exact' has 7 rows, but 'reward' has 8"]),
    "rows in another order": (swapped, ["it returned sample", "in the order they came in"]),
    "a column it was not given": (
        lambda d: {"reward": d["scores"]},
        ["KeyError: 'scores'", "the columns of the batch are 'sample_id', 'digit'"],
    ),
    "objects": (lambda d: {"judge": [object()] * 8}, ["column 'judge', row 0"]),
    "a column without a name": (lambda d: {3: [1] * 8}, ["3 names a column", "are strings"]),
}


@pytest.mark.parametrize("case", RETURNS)
def test_a_wrong_return_of_forward_step_names_the_call_and_what_to_return(
    case: str, tmp_path: Path
) -> None:
    function, words = RETURNS[case]
    worker = worker_of(Returns("reward", function), tmp_path)
    call = dataclasses.replace(
        rollout_call(2, 1), phase="scoring", inputs=(0,), source=None, version=None
    )
    table = to_arrow({"sample_id": [f"s{i}" for i in range(8)], "digit": torch.arange(8)})
    where = "reward.forward_step failed on scoring of episode 2, shard 1"
    refused(UserError, lambda: worker.forward(call, table), where, *words)
    assert not list(tmp_path.rglob("*.parquet"))


# ---- what train_step returns, and what prepares its batch -------------------------------------


class Trains(ToyTrainer):
    """A trainer some of whose methods are the functions it was given."""

    def __init__(self, name: str, **functions: Callable[..., Any]) -> None:
        super().__init__(name)
        self.functions = functions

    def _or(self, method: str, otherwise: Callable[..., Any], *args: Any) -> Any:
        return self.functions.get(method, otherwise)(*args)

    def train_step(self, data: Any, iteration: int) -> Any:
        return self._or("train_step", super().train_step, data, iteration)

    def prepare_batch(self, data: Any) -> Any:
        return self._or("prepare_batch", super().prepare_batch, data)

    def before_updates(self, batches: Any) -> Any:
        return self._or("before_updates", super().before_updates, batches)


def train(worker: Worker, **changes: Any) -> Any:
    digits = torch.arange(8)
    table = to_arrow({"digit": digits, "reward": 1.0 - (digits - 7).abs() / 10})
    return worker.train(train_call(0, 0, **changes), table)


METRICS: dict[str, tuple[Any, type[RlhfFlowsError], list[str]]] = {
    "a number": (0.5, UserError, ["it returned a float", "a dict of numbers, or None"]),
    "a list": ([0.5], UserError, ["it returned a list", "a dict of numbers"]),
    "text": ({"note": "well"}, UserError, ["its metric 'note' is a str", "float(loss)"]),
    "several numbers": ({"loss": torch.ones(2)}, UserError, ["its metric 'loss' is a Tensor"]),
    "NaN": ({"loss": float("nan")}, NonFiniteError, ["'loss' is nan", "Lower the learning rate"]),
    "infinity": ({"pg_loss": torch.tensor(torch.inf)}, NonFiniteError, ["'pg_loss' is inf"]),
}


@pytest.mark.parametrize("case", METRICS)
def test_wrong_metrics_name_the_step_and_what_to_return(case: str, tmp_path: Path) -> None:
    metrics, error, words = METRICS[case]
    worker = worker_of(Trains("trainer", train_step=lambda *_: metrics), tmp_path)
    where = "trainer.train_step failed on training of episode 0, step 1"
    refused(error, lambda: train(worker), where, *words)
    assert not worker.state().clean, "what it did to the weights must not be kept"


def test_a_column_that_nobody_scored_is_named_with_those_there_are(tmp_path: Path) -> None:
    worker = worker_of(
        Trains("trainer", train_step=lambda data, _: data[0]["advantage"].sum()), tmp_path
    )
    refused(UserError, lambda: train(worker), "KeyError: 'advantage'", "'digit', 'reward'")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda data: None, "returned NoneType for 8 rows"),
        (lambda data: {k: v[:6] for k, v in data.items()}, "returned 6 rows for 8"),
    ],
)
def test_a_prepared_batch_has_the_rows_it_was_made_of(
    function: Callable[[Any], Any], found: str, tmp_path: Path
) -> None:
    worker = worker_of(Trains("trainer", prepare_batch=function), tmp_path)
    refused(UserError, lambda: train(worker), "prepare_batch", found, "in their order")


@pytest.mark.parametrize(("shown", "found"), [(None, "NoneType"), ([], "0")])
def test_before_updates_returns_each_batch(shown: Any, found: str, tmp_path: Path) -> None:
    worker = worker_of(Trains("trainer", before_updates=lambda _: shown), tmp_path)
    rows = train_call(0, 0).rows
    refused(
        UserError,
        lambda: train(worker, episode_rows=(rows,), num_updates=1),
        f"before_updates returned {found} for 1 batches",
        "return the list of them",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"train_micro_batch_size": 8},
            ["1 micro-batches cannot be shared evenly by 2 ranks", "train_global_batch_size"],
        ),
        (
            {"train_micro_batch_tokens": 64},
            ["the batch has none of prompt_ids", "['digit', 'reward']", "train_micro_batch_size"],
        ),
    ],
)
def test_micro_batches_that_cannot_be_cut_say_what_to_set(
    settings: dict[str, int], words: list[str], tmp_path: Path
) -> None:
    worker = worker_of(ToyTrainer("trainer"), tmp_path, runtime_args=settings)
    worker._module.attach(dataclasses.replace(worker._module.context, world_size=2))
    refused(UserError, lambda: train(worker), "trainer.train_step failed", *words)


# ---- datasets ---------------------------------------------------------------------------------


class Builds(ToyPolicy):
    """A policy whose dataset is what the function makes of the rows."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        super().__init__(name)
        self.function = function

    def build_dataset(self, prompts: Any, is_eval: bool = False) -> Any:
        return self.function(prompts)


BUILDS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "nothing": (lambda rows: None, ["returned a NoneType", "torch.utils.data.Dataset"]),
    "a generator": (lambda rows: iter(rows), ["returned a list_iterator", "__len__ and"]),
    "no items": (lambda rows: Rows([]), ["a dataset without items", "return at least one"]),
    "a raise": (
        lambda rows: Rows([row["question"] for row in rows]),
        ["failed on the rows", "KeyError: 'question'", "what it expects of a row"],
    ),
}


@pytest.mark.parametrize("case", BUILDS)
def test_a_wrong_dataset_names_the_module_and_what_to_return(case: str, tmp_path: Path) -> None:
    function, words = BUILDS[case]
    worker = worker_of(Builds("policy", function), tmp_path)
    where = "Builds.build_dataset of module 'policy'"
    refused(UserError, lambda: worker.load_dataset(1, "train", "digest", ROWS), where, *words)


class Items(Rows):
    def __init__(self, item: Callable[[Any], Any], collate_fn: Any = None) -> None:
        super().__init__(ROWS)
        self.item = item
        self.collate_fn = collate_fn

    def __getitem__(self, index: int) -> Any:
        return self.item(self.rows[index])


ITEMS: dict[str, tuple[Items, list[str]]] = {
    "text": (
        Items(lambda row: row["prompt"]),
        ["an item of Items is a str", '{"prompt": item}', "a collate_fn"],
    ),
    "a raise": (
        Items(lambda row: row["question"]),
        ["of Items cannot be read (KeyError: 'question')", "its __getitem__"],
    ),
    "other keys": (
        Items(lambda row: {f"prompt {row['prompt']}": 1}),
        ["lacks the key", "give every sample the same keys"],
    ),
    "a collate_fn that gives a list": (
        Items(lambda row: row, list),
        ["collate_fn of Items returned a list", "a dict of columns"],
    ),
    "a collate_fn that loses rows": (
        Items(lambda row: row, lambda samples: {"prompt": ["a"]}),
        ["collate_fn of Items returned 1 rows for 8 samples", "one row for each"],
    ),
    "a collate_fn that raises": (
        Items(lambda row: row, lambda samples: samples["answer"]),
        ["collate_fn of Items failed (KeyError: 'answer')", "what it expects of an item"],
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_wrong_items_name_the_module_the_shard_and_what_to_return(
    case: str, tmp_path: Path
) -> None:
    dataset, words = ITEMS[case]
    worker = worker_of(Builds("policy", lambda rows: dataset), tmp_path)
    worker.load_dataset(1, "train", "digest", ROWS)
    where = "policy.dataset failed on rollout of episode 0, shard 1"
    refused(UserError, lambda: worker.forward(rollout_call(0, 1)), where, *words)


# ---- weights ----------------------------------------------------------------------------------


class Forgets(ToyTrainer):
    def setup(self) -> None:
        self.digits = nn.Linear(2, 2)

    def train_step(self, data: Any, iteration: int) -> Any:
        return {"loss": 0.0}


def test_a_trained_module_that_sets_no_model_says_where_to_set_it(tmp_path: Path) -> None:
    worker = worker_of(Forgets("trainer"), tmp_path)
    train(worker, num_updates=1)
    refused(
        ConfigError,
        lambda: worker.checkpoint(1, 1, True),
        "module 'trainer' has nothing as self.model",
        "set self.model in Forgets.setup",
    )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_is_used_and_not_set_is_named(tmp_path: Path) -> None:
    class NoModel(ToyTrainer):
        def setup(self) -> None: ...

    worker = worker_of(NoModel("trainer"), tmp_path)
    refused(UserError, lambda: train(worker), "trainer.train_step failed", "'model'")


class Wider(TorchModule):
    def setup(self) -> None:
        self.model = nn.Linear(11, 1)


def test_weights_of_an_unlike_model_change_nothing(tmp_path: Path) -> None:
    policy = worker_of(ToyPolicy("policy"), tmp_path)
    before = policy.weights_digests(1)
    wider = worker_of(Wider("wider"), tmp_path)
    refused(
        SyncError,
        lambda: policy._module.load_weights(wider._module.named_weights()),
        "module 'policy' cannot take these weights",
        "preferences is missing",
        "weight is not in the model",
        "the same model in the same dtype",
    )
    policy._digests = {}
    assert policy.weights_digests(1) == before


# ---- what a module is given -------------------------------------------------------------------


ASKS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "an attribute": (
        lambda module: module.runtime_args.num_epsode,
        ["runtime has no 'num_epsode'", "did you mean 'num_episode'?"],
    ),
    "a key": (
        lambda module: module.runtime_args["num_epsode"],
        ["runtime has no 'num_epsode'", "did you mean 'num_episode'?"],
    ),
    "an argument of its own": (
        lambda module: module.model_args.path,
        ["models.trainer.args_dict has no 'path'", "it has ['size']"],
    ),
    "a timer that runs": (
        lambda module: (module.timers("x").start(), module.timers("x").start()),
        ["timer 'x' runs already", "stop it before"],
    ),
    "a timer that does not run": (
        lambda module: module.timers("x").stop(),
        ["timer 'x' does not run", "start it before"],
    ),
}


@pytest.mark.parametrize("case", ASKS)
def test_what_a_module_asks_wrongly_is_named(case: str, tmp_path: Path) -> None:
    ask, words = ASKS[case]

    class Asks(ToyTrainer):
        def train_step(self, data: Any, iteration: int) -> Any:
            return ask(self)

    worker = worker_of(
        Asks("trainer"), tmp_path, runtime_args={"num_episode": 3}, model_args={"size": 2}
    )
    refused(UserError, lambda: train(worker), "trainer.train_step failed on training", *words)


# ---- relay functions --------------------------------------------------------------------------


RELAYS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "nothing": (lambda episodes: None, ["a list of samples", "each a dict"]),
    "episodes": (lambda episodes: episodes, ["a list of samples", "each a dict"]),
    "no samples": (lambda episodes: [], ["returned no samples", "runtime.relay_episode_offset"]),
    "too few": (
        lambda episodes: episodes[-1].buffer[:5],
        ["returned 5 samples, the stream is fixed at 8", "stream_data_loader_type=dynamic"],
    ),
    "a raise": (lambda episodes: episodes[-1].reward, ["AttributeError", "'reward'"]),
}


@pytest.mark.parametrize("case", RELAYS)
def test_a_wrong_relay_function_is_named_with_what_to_return(case: str, tmp_path: Path) -> None:
    function, words = RELAYS[case]
    worker = Worker(spec_of(ToyTrainer("trainer"), tmp_path, relay=cloudpickle.dumps(function)))
    worker.setup(1)
    call = RelayCall(
        attempt=1, episode=4, version=4, episodes=((4, (1,)),), left_out=frozenset(), expected=8
    )
    table = to_arrow({"sample_id": [f"s{i}" for i in range(8)], "digit": torch.arange(8)})
    where = "trainer.relay failed on training of episode 4"
    refused(UserError, lambda: worker.relay(call, table), where, *words)
