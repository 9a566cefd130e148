"""Wrong programs and configurations, each refused before anything starts.

Each case is a small program as somebody might write it. Its error is one of ours, and says what is
wrong, what was found, and what to do: the words beside it. No actor, no cluster, no Prefect server
starts, which the trap below holds. What only a running worker can notice is in
end_to_end/test_misuse_at_work.py.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_flows import initialization
from rlhf_flows.attempt import running
from rlhf_flows.chatlearn_options import ELSEWHERE
from rlhf_flows.engine import Engine, Environment, Evaluator, Trainer
from rlhf_flows.engines import SFTEngine
from rlhf_flows.errors import UserError
from rlhf_flows.graph import ControlDependencies
from rlhf_flows.initialization import init
from rlhf_flows.modules import BaseModule
from rlhf_flows.pools import cluster
from tests.toys import ToyPolicy, ToyReward, ToyTrainer

Case = Callable[[Path], Any]
CASES: list[Any] = []


def says(*words: str) -> Callable[[Case], Case]:
    """The program is refused, in these words."""

    def add(case: Case) -> Case:
        CASES.append(pytest.param(case, words, id=case.__name__))
        return case

    return add


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No way to start Ray or Prefect, and no configuration that outlives the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was about to be started")

    monkeypatch.setattr(cluster, "_init", refuse)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(running, "kept_prefect_api", refuse)
    before = list(initialization._initial)
    yield
    initialization._initial[:] = before


@pytest.mark.parametrize(("case", "words"), CASES)
def test_it_is_refused_before_anything_starts(
    case: Case, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        case(tmp_path)
    for word in words:
        assert word in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert not list(tmp_path.rglob("attempts")), "an attempt was taken"


# ---- the programs' parts ----------------------------------------------------------------------

ROWS = [{"prompt": str(i)} for i in range(8)]
policy, trainer, reward = ToyPolicy("policy"), ToyTrainer("trainer"), ToyReward("reward")


def trains(batch: Any) -> None:
    trainer.train_step(batch)


def samples(batch: Any) -> Any:
    sampled = policy.forward_step(batch)
    return sampled, reward.forward_step(sampled)


def sound() -> Engine:
    """A program with nothing wrong."""
    engine = Engine(Environment(samples), Trainer(trains), name="toy")
    return engine.set_dataset(ROWS).set_parameter_sync(trainer, policy)


def flows(env_flow: Any = samples, trainer_flow: Any = trains) -> Any:
    """Checks an engine of these flows."""
    return Engine(Environment(env_flow), Trainer(trainer_flow)).set_dataset(ROWS).check()


def asks(**settings: Any) -> Any:
    """Checks the sound program under these settings."""
    return sound().configure(settings).check()


def runs(**runtime: Any) -> Any:
    return asks(runtime=runtime)


def places(**models: Any) -> Any:
    return asks(models=models)


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_sound_program_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sound().check()
    places(policy={"num_replica": 2}, trainer={"ranks_per_replica": 2})


def test_the_trap_catches_a_program_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="about to be started"):
        sound().learn()


# ---- flows ------------------------------------------------------------------------------------


@says("Environment was given a str, expected a flow", "a function of one batch")
def a_flow_that_is_no_function(_: Path) -> None:
    Environment("policy.forward_step")  # type: ignore[arg-type]


@says("the flow 'idle' called no module", "policy.forward_step(batch)")
def a_flow_that_calls_nothing(_: Path) -> None:
    def idle(batch: Any) -> Any:
        return batch

    flows(idle)


@says("missing 1 required positional argument", "called once with a batch")
def a_flow_of_two_arguments(_: Path) -> None:
    flows(lambda batch, iteration: policy.forward_step(batch))


@says("the flow 'flow' returned a coroutine", "a plain `def`")
def a_flow_that_is_async(_: Path) -> None:
    async def flow(batch: Any) -> Any:
        return policy.forward_step(batch)

    flows(flow)


@says("the flow 'flow' returned a generator", "without `async` or `yield`")
def a_flow_that_yields(_: Path) -> None:
    def flow(batch: Any) -> Any:
        yield policy.forward_step(batch)

    flows(flow)


@says("reads ['reward'] of the output of reward.forward_step", "into a module's method")
def a_flow_that_reads_a_column(_: Path) -> None:
    flows(lambda b: reward.forward_step(policy.forward_step(b))["reward"])


@says("iterates over the batch", "no data exists yet")
def a_flow_that_iterates_over_samples(_: Path) -> None:
    flows(lambda b: [policy.forward_step(sample) for sample in b])


@says("branches on the output of policy.forward_step", "Move this step into")
def a_flow_that_branches_on_data(_: Path) -> None:
    flows(lambda b: reward.forward_step(b) if policy.forward_step(b) else b)


@says("asks for the length of the batch", "Move this step into")
def a_flow_that_asks_for_a_length(_: Path) -> None:
    flows(lambda b: policy.forward_step(b, part=len(b) // 2))


@says("reads `.keys` of the batch", "Move this step into")
def a_flow_that_reads_an_attribute(_: Path) -> None:
    flows(lambda b: policy.forward_step(dict(b)))


@says("the flow 'flow' returned a float", "what its modules returned")
def a_flow_that_returns_a_number(_: Path) -> None:
    def flow(batch: Any) -> Any:
        policy.forward_step(batch)
        return 0.5

    flows(flow)


@says("policy.forward_stp", "ToyPolicy does not have", "did you mean 'forward_step'?")
def a_method_whose_name_is_misspelt(_: Path) -> None:
    flows(lambda b: policy.forward_stp(b))


@says("policy.rank_by_elo", "define it in ToyPolicy")
def a_method_that_does_not_exist(_: Path) -> None:
    flows(lambda b: policy.rank_by_elo(b))


@says("'ToyPolicy' object is not callable", "policy.forward_step(batch)")
def a_module_that_is_called_itself(_: Path) -> None:
    flows(lambda b: policy(b))  # type: ignore[operator]


@says("policy.forward_step was called with a batch that another flow", "its own argument only")
def a_cyclic_flow(_: Path) -> None:
    """Takes what it returned when it was called before."""
    last: list[Any] = []

    def flow(batch: Any) -> Any:
        last.append(policy.forward_step(last[-1] if last else batch))
        return last[-1]

    flows(flow)
    flows(flow)


@says("policy.forward_step the last", "its loop does not end", "a number of turns")
def a_flow_that_never_ends(_: Path) -> None:
    def flow(batch: Any) -> Any:
        for _turn in itertools.count():
            batch = policy.forward_step(batch)

    flows(flow)


@says("positional argument that is no batch (0.7)", "pass it by name")
def a_constant_by_position(_: Path) -> None:
    flows(lambda b: policy.forward_step(b, 0.7))


@says("ToyPolicy.forward_step of module 'policy'", "'temperature'", "define it as forward_step(")
def an_option_that_the_method_does_not_take(_: Path) -> None:
    flows(lambda b: policy.forward_step(b, temperature=0.7))


@says("ControlDependencies was given a ToyPolicy", "what calls of modules returned")
def a_dependency_on_a_module(_: Path) -> None:
    def flow(batch: Any) -> Any:
        with ControlDependencies(policy):
            return policy.forward_step(batch)

    flows(flow)


@says("ControlDependencies orders the calls of a flow", "use it inside of one")
def dependencies_outside_of_a_flow(_: Path) -> None:
    with ControlDependencies():
        sound()


@says("two modules are named 'model'", "give one of them another")
def two_modules_of_one_name_in_a_flow(_: Path) -> None:
    first, second = ToyPolicy("model"), ToyReward("model")
    flows(lambda b: second.forward_step(first.forward_step(b)))


@says("two modules are named 'policy', in different flows", "give one of them another")
def two_modules_of_one_name_in_two_flows(_: Path) -> None:
    namesake = ToyTrainer("policy")
    flows(trainer_flow=lambda b: namesake.train_step(b))


@says("a module cannot be named 'the policy'", "letters, digits")
def a_module_whose_name_is_no_folder(_: Path) -> None:
    module = ToyPolicy("the policy")
    flows(lambda b: module.forward_step(b))


@says("a module cannot be named 3", "as in 'policy'")
def a_module_whose_name_is_a_number(_: Path) -> None:
    module = ToyPolicy(3)  # type: ignore[arg-type]
    flows(lambda b: module.forward_step(b))


# ---- modules ----------------------------------------------------------------------------------


class Silent(BaseModule):
    """Defines nothing."""


@says("calls silent.forward_step, but Silent defines no forward_step(data, iteration)", "write one")
def a_module_without_forward_step(_: Path) -> None:
    silent = Silent("silent")
    flows(lambda b: silent.forward_step(policy.forward_step(b)))


@says("the trainer's flow calls silent.train_step, but Silent defines no train_step", "write one")
def a_module_without_train_step(_: Path) -> None:
    silent = Silent("silent")
    flows(trainer_flow=lambda b: silent.train_step(b))  # type: ignore[call-arg]


@says("calls silent.eval_step", "nor a forward_step that it would call", "write one")
def a_module_without_eval_step(_: Path) -> None:
    silent = Silent("silent")
    sound().set_evaluator(Evaluator(lambda b: silent.eval_step(b)).set_dataset(ROWS)).check()


@says("module 'reward' comes first in its flow, but ToyReward defines no build_dataset", "Dataset")
def a_module_without_build_dataset(_: Path) -> None:
    flows(lambda b: reward.forward_step(b))


@says("Short.forward_step of module 'short'", "define it as forward_step(self, data, iteration=0)")
def a_forward_step_without_data(_: Path) -> None:
    class Short(ToyPolicy):
        def forward_step(self) -> Any: ...  # type: ignore[override]

    short = Short("short")
    flows(lambda b: short.forward_step(b))


@says("Short.train_step of module 'short'", "define it as train_step(self, data, iteration)")
def a_train_step_without_iteration(_: Path) -> None:
    class Short(ToyTrainer):
        def train_step(self, data: Any) -> Any: ...  # type: ignore[override]

    short = Short("short")
    flows(trainer_flow=lambda b: short.train_step(b))


@says("Short.build_dataset of module 'short'", "'is_eval'", "(self, prompts, is_eval=False)")
def a_build_dataset_without_is_eval(_: Path) -> None:
    class Short(ToyPolicy):
        def build_dataset(self, prompts: Any) -> Any: ...  # type: ignore[override]

    short = Short("short")
    flows(lambda b: short.forward_step(b))


@says("Wide.setup of module 'wide'", "define it as setup(self)")
def a_setup_that_wants_arguments(_: Path) -> None:
    class Wide(ToyReward):
        def setup(self, path: str) -> None: ...  # type: ignore[override]

    wide = Wide("wide")
    flows(lambda b: wide.forward_step(policy.forward_step(b)))


@says("Later.forward_step of module 'later' is defined with `async`", "asyncio.run")
def a_forward_step_that_is_async(_: Path) -> None:
    class Later(ToyReward):
        async def forward_step(self, data: Any, iteration: int = 0) -> Any: ...  # type: ignore[override]

    later = Later("later")
    flows(lambda b: later.forward_step(policy.forward_step(b)))


@says("module 'locked' cannot be sent to its workers", "lock", "Locked.setup, not in __init__")
def a_module_that_cannot_be_sent(_: Path) -> None:
    class Locked(ToyReward):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.lock = threading.Lock()

    locked = Locked("locked")
    flows(lambda b: locked.forward_step(policy.forward_step(b)))


@says("module 'bare' is trained", "Bare defines no named_weights", "a subclass of TorchModule")
def a_trained_module_without_weights(_: Path) -> None:
    class Bare(BaseModule):
        def train_step(self, data: Any, iteration: int) -> Any: ...

    bare = Bare("bare")
    flows(trainer_flow=lambda b: bare.train_step(b))  # type: ignore[call-arg]


# ---- the trainer's flow, and weights that follow ----------------------------------------------


@says("trainer.train_step", "takes another call's output", "with the batch itself")
def a_trainer_flow_that_chains_calls(_: Path) -> None:
    value = ToyTrainer("value")
    flows(trainer_flow=lambda b: trainer.train_step(value.train_step(b)))  # type: ignore[arg-type]


@says("the trainer's flow calls 'trainer' twice", "one step a batch")
def a_trainer_flow_that_trains_a_module_twice(_: Path) -> None:
    flows(trainer_flow=lambda b: (trainer.train_step(b), trainer.train_step(b)))  # type: ignore[call-arg]


@says("the trainer's flow calls policy.forward_step", "call train_step there")
def a_trainer_flow_that_samples(_: Path) -> None:
    flows(trainer_flow=lambda b: policy.forward_step(b))


@says("flow calls trainer.train_step", "call it in Trainer(flow)")
def an_environment_that_trains(_: Path) -> None:
    flows(lambda b: trainer.train_step(policy.forward_step(b)))  # type: ignore[call-arg, arg-type]


@says("takes weights from 'reward'", "does not train", "it trains trainer")
def a_sync_from_an_untrained_module(_: Path) -> None:
    sound().set_parameter_sync(reward, policy).check()


@says("gives 'value' the weights of 'trainer'", "a module is trained, or follows another")
def a_sync_to_a_trained_module(_: Path) -> None:
    value = ToyTrainer("value")
    both = Trainer(lambda b: (trainer.train_step(b), value.train_step(b)))  # type: ignore[call-arg]
    sound().set_trainer(both).set_parameter_sync(trainer, value).check()


@says("given 'trainer' twice", "no sync with itself")
def a_sync_to_itself(_: Path) -> None:
    sound().set_parameter_sync(trainer, trainer)


@says("names 'old', which no flow of the engine calls", "policy, reward, trainer")
def a_sync_to_a_module_that_nobody_calls(_: Path) -> None:
    sound().set_parameter_sync(trainer, ToyPolicy("old")).check()


@says("'policy' follows two trainers", "weights of one")
def two_trainers_for_one_policy(_: Path) -> None:
    value = ToyTrainer("value")
    both = Trainer(lambda b: (trainer.train_step(b), value.train_step(b)))  # type: ignore[call-arg]
    sound().set_trainer(both).set_parameter_sync(value, policy).check()


@says(
    "module 'reward' follows a trained module", "ToyReward defines no load_weights", "TorchModule"
)
def a_sync_to_a_module_without_weights(_: Path) -> None:
    sound().set_parameter_sync(trainer, reward).check()


@says("set_parameter_sync was given eta=1.5 for 'policy'", "between 0 and 1")
def an_average_that_runs_ahead(_: Path) -> None:
    sound().set_parameter_sync(trainer, policy, eta=1.5)


@says("set_parameter_sync was given a str ('trainer')", "give it the modules themselves")
def a_sync_of_names(_: Path) -> None:
    sound().set_parameter_sync("trainer", "policy")  # type: ignore[arg-type]


@says("'both' is trained and asked in the environment", "runtime.max_staleness=1", "or set it to 0")
def a_lag_behind_oneself(_: Path) -> None:
    class Both(ToyPolicy, ToyTrainer): ...

    both = Both("both")
    engine = Engine(
        Environment(lambda b: both.forward_step(b)), Trainer(lambda b: both.train_step(b))
    )
    engine.set_dataset(ROWS).configure({"runtime": {"max_staleness": 1}}).check()


# ---- engines ----------------------------------------------------------------------------------


@says("neither trainer nor evaluator", "set_trainer or set_evaluator")
def an_engine_of_nothing(_: Path) -> None:
    Engine().learn()


@says("an environment, but no trainer", "set_trainer")
def an_engine_that_samples_for_nobody(_: Path) -> None:
    evaluator = Evaluator(lambda b: policy.eval_step(b)).set_dataset(ROWS)
    Engine(Environment(samples), evaluator=evaluator).set_dataset(ROWS).check()


@says("an engine's trainer was given as a function", "Trainer(flow)")
def a_flow_in_place_of_a_trainer(_: Path) -> None:
    Engine(Environment(samples), trains)  # type: ignore[arg-type]


@says("an engine's trainer was given as a Environment", "Trainer(flow)")
def parts_in_the_wrong_place(_: Path) -> None:
    sound().set_trainer(Environment(samples))  # type: ignore[arg-type]


@says("'str' object has no attribute 'forward_step'", "only to call methods of modules")
def a_flow_that_calls_a_name(_: Path) -> None:
    flows(lambda b: "policy".forward_step(b))  # type: ignore[attr-defined]


@says("an engine cannot be named 'my engine'", "or give run_name")
def an_engine_whose_name_is_no_folder(_: Path) -> None:
    SFTEngine(trainer, name="my engine").set_dataset(ROWS).check()


@says("evaluate was called on an engine without an evaluator", "set_evaluator(Evaluator(")
def evaluating_without_an_evaluator(_: Path) -> None:
    sound().evaluate()


@says("set_post_process_func was given a dict", "expected a function")
def a_post_process_that_is_no_function(_: Path) -> None:
    Evaluator(samples).set_post_process_func({"mean": 1})  # type: ignore[arg-type]


@says("set_relay_sample_manager was given a list", "expected a function")
def a_relay_that_is_no_function(_: Path) -> None:
    sound().set_relay_sample_manager([])  # type: ignore[arg-type]


@says("a relay function, but runtime.max_relay_episode is 0", "-1 for all")
def a_relay_function_that_would_not_be_asked(_: Path) -> None:
    sound().set_relay_sample_manager(lambda episodes: episodes[-1]).check()


@says("set_dataset was called on an engine with neither", "give it one first")
def a_dataset_for_nobody(_: Path) -> None:
    Engine().set_dataset(ROWS)


# ---- datasets ---------------------------------------------------------------------------------


@says("the engine's dataset is missing", "set_dataset(rows)")
def no_dataset(_: Path) -> None:
    Engine(Environment(samples), Trainer(trains)).check()


@says("the evaluator's dataset is missing", "set_dataset(rows)")
def no_dataset_of_the_evaluator(_: Path) -> None:
    sound().set_evaluator(Evaluator(lambda b: policy.eval_step(b))).check()


@says("the engine's dataset is empty", "at least one row")
def an_empty_dataset(_: Path) -> None:
    sound().set_dataset([]).check()


@says("dataset 1 of the engine's datasets is empty", "at least one row")
def an_empty_dataset_among_others(_: Path) -> None:
    sound().set_multiple_datasets([ROWS, []]).check()


@says("holds no rows", "prompts.jsonl", "at least one object")
def an_empty_file(folder: Path) -> None:
    sound().set_dataset(written(folder, "\n", "prompts.jsonl")).check()


@says("prompts.jsonl: there is no such file", "did you mean", "prompt.jsonl?")
def a_file_that_is_not_there(folder: Path) -> None:
    written(folder, '{"prompt": "a"}\n', "prompt.jsonl")
    sound().set_dataset(str(folder / "prompts.jsonl")).check()


@says("the engine's dataset is a int", "a list of rows")
def a_dataset_that_is_a_number(_: Path) -> None:
    sound().set_dataset(512).check()  # type: ignore[arg-type]


@says("the engine's dataset is a dict", "a list of rows")
def a_dataset_of_columns(_: Path) -> None:
    sound().set_dataset({"prompt": ["a", "b"]}).check()  # type: ignore[arg-type]


@says("the engine's dataset is a generator", "a list of rows")
def a_dataset_that_can_be_read_once(_: Path) -> None:
    sound().set_dataset(row for row in ROWS).check()  # type: ignore[arg-type]


@says("row 1 of the dataset", "it holds a object", "use text, numbers")
def a_row_that_no_file_could_hold(_: Path) -> None:
    sound().set_dataset([{"prompt": "a"}, {"prompt": object()}]).check()


@says("row 0 of the dataset", "whose keys are text")
def a_row_whose_keys_are_mixed(_: Path) -> None:
    sound().set_dataset([{"prompt": "a", 1: 2}]).check()


@says("set_multiple_datasets was given {'a': []", "expected a list of datasets")
def datasets_that_are_no_list(_: Path) -> None:
    sound().set_multiple_datasets({"a": [], "b": []})  # type: ignore[arg-type]


@says("runtime.data_ratio has 3 numbers, but there are 2 datasets", "one number for each")
def a_ratio_of_another_length(_: Path) -> None:
    sound().set_multiple_datasets([ROWS, ROWS]).configure(
        {"runtime": {"data_ratio": [1, 2, 1]}}
    ).check()


def test_a_dataset_that_does_not_end_by_itself_is_read_to_its_length() -> None:
    class Endless:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"prompt": str(index)}

    sound().set_dataset(Endless()).check()  # type: ignore[arg-type]


# ---- placement --------------------------------------------------------------------------------


@says("models.polcy is configured, but no flow calls", "policy, reward, trainer")
def a_placement_of_an_unknown_module(_: Path) -> None:
    places(polcy={"num_replica": 2})


@says("runtime.colocation names 'polcy', which no flow calls", "policy, reward, trainer")
def a_colocation_of_an_unknown_module(_: Path) -> None:
    runs(colocation=[["polcy", "trainer"]])


@says("runtime.colocation names 'policy' 2 times", "of one group")
def a_module_in_two_colocations(_: Path) -> None:
    runs(colocation=[["policy", "trainer"], ["policy", "reward"]])


@says("models.trainer.num_replica is 2, but it is trained", "ranks_per_replica")
def two_replicas_of_a_trained_module(_: Path) -> None:
    places(trainer={"num_replica": 2})


@says(
    "models.trainer.trainable is false, but the trainer's flow trains it", "leave the setting out"
)
def a_trained_module_that_is_said_not_to_be(_: Path) -> None:
    places(trainer={"trainable": False})


@says("models.policy.trainable is true", "does not train it", "or change the flow")
def an_untrained_module_that_is_said_to_be(_: Path) -> None:
    places(policy={"trainable": True})


@says("models.policy.num_gpu=3 is not a multiple of models.policy.gpu_per_process=2", "num_gpu to")
def gpus_that_processes_cannot_share(_: Path) -> None:
    places(policy={"num_gpu": 3, "gpu_per_process": 2})


@says(
    "models.policy.num_cpu=1 is not a multiple of models.policy.cpu_per_process=0.4", "num_cpu to"
)
def cpus_that_processes_cannot_share(_: Path) -> None:
    places(policy={"num_cpu": 1, "cpu_per_process": 0.4})


@says("models.policy.ranks_per_replica=3 is not a multiple", "product, 2", "to a multiple of 2")
def parallel_sizes_that_do_not_divide(_: Path) -> None:
    places(policy={"ranks_per_replica": 3, "tensor_model_parallel_size": 2})


@says("models.policy has 3 processes and replicas of 2", "multiple of 2")
def processes_that_replicas_cannot_share(_: Path) -> None:
    places(policy={"num_cpu": 3, "cpu_per_process": 1, "tensor_model_parallel_size": 2})


@says("policy 100000 GPUs", "this machine has", "lower models.<name>.num_gpu")
def more_gpus_than_there_are(_: Path) -> None:
    places(policy={"num_gpu": 100_000})


@says("policy 100000 CPUs", "this machine has", "lower models.<name>.num_cpu")
def more_cpus_than_there_are(_: Path) -> None:
    places(policy={"num_cpu": 100_000})


# ---- numbers that do not divide ---------------------------------------------------------------


@says("runtime.sample_per_episode=30", "runtime.num_inference_per_prompt=4", "take 28")
def an_episode_that_cuts_a_group(_: Path) -> None:
    runs(sample_per_episode=30, num_inference_per_prompt=4)


@says("runtime.sample_per_episode=32", "runtime.train_global_batch_size=24", "take batches of 16")
def a_batch_that_does_not_divide(_: Path) -> None:
    runs(sample_per_episode=32, train_global_batch_size=24)


@says("runtime.train_global_batch_size=64 is more than", "lower the first")
def a_batch_larger_than_the_episode(_: Path) -> None:
    runs(sample_per_episode=32, train_global_batch_size=64)


@says("the training batch of 32 samples", "runtime.train_micro_batch_size=5", "take 4")
def a_micro_batch_that_does_not_divide(_: Path) -> None:
    runs(sample_per_episode=32, train_micro_batch_size=5)


@says("train_micro_batch_size and runtime.train_micro_batch_tokens are both", "leave the other out")
def micro_batches_of_both_kinds(_: Path) -> None:
    runs(train_micro_batch_size=4, train_micro_batch_tokens=4096)


@says("is 1 micro-batches", "the 2 ranks of 'trainer'", "as a multiple of 64")
def micro_batches_that_ranks_cannot_share(_: Path) -> None:
    asks(
        runtime={"sample_per_episode": 32, "train_micro_batch_size": 32},
        models={"trainer": {"ranks_per_replica": 2}},
    )


@says("the relay function cannot be sent to its workers", "lock", "inside it")
def a_relay_function_that_cannot_be_sent(_: Path) -> None:
    lock = threading.Lock()

    def relay(episodes: Any) -> Any:
        with lock:
            return episodes[-1]

    sound().set_relay_sample_manager(relay).configure({"runtime": {"max_relay_episode": 2}}).check()


@says("runtime.relay_episode_offset is given, but no episode", "set runtime.max_relay_episode")
def an_offset_of_no_relay(_: Path) -> None:
    runs(relay_episode_offset=2)


@says("runtime.stream_data_loader_type is dynamic", "set runtime.max_relay_episode")
def a_dynamic_stream_without_a_relay(_: Path) -> None:
    runs(stream_data_loader_type="dynamic")


@says("runtime.max_relay_episode is 2, but the engine has no relay", "set_relay_sample_manager")
def a_relay_without_a_function(_: Path) -> None:
    runs(max_relay_episode=2)


# ---- configurations ---------------------------------------------------------------------------


@says("unknown setting 'runtime.num_epsode'", "did you mean 'runtime.num_episode'?")
def an_unknown_key(_: Path) -> None:
    runs(num_epsode=3)


@says("unknown setting 'num_episode'", "did you mean 'runtime.num_episode'?")
def a_key_without_its_section(_: Path) -> None:
    sound().learn(num_episode=3)


@says("unknown setting 'models.policy.num_gpus'", "did you mean 'models.policy.num_gpu'?")
def an_unknown_key_of_a_model(_: Path) -> None:
    places(policy={"num_gpus": 1})


@says("setting 'runtime.num_episode'", "valid integer", "found 'three'")
def a_value_of_another_type(_: Path) -> None:
    runs(num_episode="three")


@says("setting 'runtime'", "valid dictionary", "found 3")
def a_section_that_is_a_number(_: Path) -> None:
    asks(runtime=3)


@says("log_level=LOUD is no level", "INFO")
def a_log_level_that_does_not_exist(_: Path) -> None:
    asks(log_level="LOUD")


@says("'models.policy.args_dict.sampler' is a ToyReward", "a module's constructor")
def an_object_in_the_configuration(_: Path) -> None:
    places(policy={"args_dict": {"sampler": reward}})


@says("configure was given a str", "rlhf_flows.init(file)")
def a_file_for_configure(_: Path) -> None:
    sound().configure("run.yaml")  # type: ignore[arg-type]


@says("init was given a int", "the name of a YAML file")
def a_number_for_init(_: Path) -> None:
    init(3)  # type: ignore[arg-type]


@says("nowhere.yaml", "cannot be read")
def a_configuration_file_that_is_not_there(folder: Path) -> None:
    init(folder / "nowhere.yaml")


@says("run.yaml is not readable as YAML", "'policy' stands in it twice", "leave one of them out")
def two_models_of_one_name(folder: Path) -> None:
    init(written(folder, "models:\n  policy: {num_replica: 1}\n  policy: {num_replica: 2}\n"))


@says("asks for the environment variable NO_SUCH_MODEL", "set it, or give a default")
def a_variable_that_is_not_set(folder: Path) -> None:
    init(written(folder, "models: {policy: {args_dict: {path: '${NO_SUCH_MODEL}/hf'}}}\n"))


@says("includes itself", "run.yaml includes other.yaml includes run.yaml", "leave one of these out")
def a_file_that_includes_itself(folder: Path) -> None:
    written(folder, "includes: run.yaml\n", "other.yaml")
    init(written(folder, "includes: [other.yaml]\n"))


@says("base.yaml cannot be read", "No such file")
def an_included_file_that_is_not_there(folder: Path) -> None:
    init(written(folder, "includes: base.yaml\n"))


@says("'includes' of", "is a int", "a list of them")
def an_include_that_is_no_name(folder: Path) -> None:
    init(written(folder, "includes: 3\n"))


@says("policy.yaml cannot be read", "No such file")
def a_model_config_file_that_is_not_there(folder: Path) -> None:
    init(written(folder, "models: {policy: {model_config_file: policy.yaml}}\n"))


@pytest.mark.parametrize(
    ("section", "option"),
    [(section, option) for section, options in ELSEWHERE.items() for option in options],
)
def test_an_option_of_chatlearn_without_a_meaning_says_why(section: str, option: str) -> None:
    first, _, rest = section.partition(".")
    fields = {option: 1} if not rest else {"policy": {option: 1}}
    with pytest.raises(UserError) as refused:
        init({first: fields})
    dotted = f"{section.replace('*', 'policy')}.{option}"
    reason = ELSEWHERE[section][option]
    assert f"setting {dotted!r} of ChatLearn has no meaning here: {reason}" in str(refused.value)


# ---- the run and its store --------------------------------------------------------------------


@says("a run cannot be named '../elsewhere'", "letters, digits")
def a_run_name_that_leaves_the_store(_: Path) -> None:
    asks(run_name="../elsewhere")


@says("store.url cannot be used", "/taken", "name a folder instead")
def a_store_that_is_a_file(folder: Path) -> None:
    asks(store={"url": written(folder, "", "taken")})


@says("store.url cannot be used", "unknown scheme 'ftp'", "s3://")
def a_store_of_no_kind(_: Path) -> None:
    asks(store={"url": "ftp://host/runs"})


@says("run 'mine'", "runtime.seed", "run_name")
def a_run_name_of_another_configuration(_: Path) -> None:
    asks(run_name="mine")
    asks(run_name="mine", runtime={"seed": 5})


@says("runtime_env.working_dir names 'code', which is not there", "an absolute one")
def a_working_folder_that_is_not_there(_: Path) -> None:
    asks(runtime_env={"working_dir": "code"})


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40
    assert len({case.id for case in CASES}) == len(CASES)


@says(
    "'ppo_policy' and 'ppo_value' have different PPO settings", "gamma=1.0 and 0.9", "the same ppo"
)
def trainers_of_other_returns(folder: Path) -> None:
    from rlhf_flows import RLHFEngine
    from rlhf_flows.models import PPOPolicyTrainer, ValueTrainer
    from rlhf_flows.settings import PPOSettings

    learner = PPOPolicyTrainer("ppo_policy", path=folder, ppo=PPOSettings(gamma=1.0))
    critic = ValueTrainer("ppo_value", path=folder, ppo=PPOSettings(gamma=0.9))
    RLHFEngine(policy, reward, reward, reward, learner, critic)


@says("'ppo_policy' and 'value' have different PPO settings", "value_norm=none and exp")
def a_value_model_of_other_returns(folder: Path) -> None:
    from rlhf_flows import RLHFEngine
    from rlhf_flows.models import PPOPolicyTrainer, ValueModel
    from rlhf_flows.settings import PPOSettings

    learner = PPOPolicyTrainer("ppo_policy", path=folder)
    value = ValueModel("value", path=folder, ppo=PPOSettings(value_norm="exp"))
    RLHFEngine(policy, reward, reward, value, learner, trainer)
