"""`VLLMModule`: a module that samples with vLLM, in the process of its worker.

A subclass calls `setup_engine` in its `setup`, and then has `generate`, `load_weights` and
`probe_logprobs`. The decision here: the engine lives in the worker's own process and one call of
`generate` has it to itself: all its requests are admitted together, each with its own seed, into an
idle engine with an empty prefix cache. What else an engine computes changes the bits of a sample;
so the same call gives the same bits, whatever came before and whichever replica takes it.

vLLM is imported in this file only, and only by `setup_engine`. Knows nothing of Ray.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_flows.errors import (
    ConfigError,
    DataError,
    ResourcesError,
    SyncError,
    TransientError,
    UserError,
)
from rlhf_flows.generation import Completion, GenerationSettings, check_request
from rlhf_flows.modules.base import TakeWeights, TensorKind
from rlhf_flows.modules.hf_folder import HFFolder
from rlhf_flows.modules.torch_module import TorchModule, is_overridden, kind_of

__all__ = ["VLLMModule"]

CPU_BLOCK_SIZE = 32
"""Tokens per block of the cache: vLLM's kernels for CPU want a multiple of 32, its default is 128,
and only whole blocks are shared between siblings."""
CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention for CPU takes (0.32); another width fails only at the first request."""
CPU_CACHE_BYTES_MIN, CPU_CACHE_BYTES_MAX = 16 << 20, 4 << 30


class VLLMModule(TorchModule):
    """One vLLM engine. Its calls are rollout; a model used as a judge sets `generates = False`.

    A subclass that sets `self.model` in place of an engine is a `TorchModule` that generates.
    """

    generates: ClassVar[bool] = True
    default_threads: ClassVar[int | None] = 1
    """On CPU: with more, bits depend on the batch, and shared cores make it many times slower."""

    _llm: Any = None
    _folder: HFFolder
    _end_token_ids: frozenset[int] = frozenset()
    _max_model_len: int = 0
    _broken: str | None = None
    """Why the engine must not be used again."""

    @staticmethod
    def available() -> bool:
        """Whether vLLM is installed; does not import it."""
        return importlib.util.find_spec("vllm") is not None

    def setup_engine(
        self,
        path: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        end_token_ids: Iterable[int] = (),
        **engine_args: Any,
    ) -> None:
        """Loads the model of a Hugging Face folder into an engine.

        Args:
            path: the folder.
            dtype: `float32`, `bfloat16`, `float16`, or `auto`: that of the folder.
            max_model_len: most tokens of prompt and completion together; the model's own limit
                if not given.
            max_num_seqs: most requests computed at the same time.
            kv_cache_memory_bytes: size of the cache of keys and values. If not given: on a GPU
                what `gpu_memory_utilization` leaves; on CPU what `max_num_seqs` texts of full
                length take, within 16 MiB and 4 GiB.
            end_token_ids: tokens that end a completion, beside those that the folder names.
            engine_args: anything else that vLLM's `EngineArgs` takes.
        """
        if not self.available():
            raise ConfigError(
                f"module {self.name!r} samples with vLLM, which is not installed: install"
                " `rlhf-flows[cpu]` or `rlhf-flows[gpu]`, or use TorchPolicy"
            )
        self._folder = HFFolder(path)
        if self._on_cpu and self._folder.head_width not in CPU_HEAD_WIDTHS:
            raise ConfigError(
                f"the heads of the model in {str(path)!r} are {self._folder.head_width} wide, and"
                f" vLLM on CPU takes {', '.join(map(str, CPU_HEAD_WIDTHS))}: use TorchPolicy"
                f" (sampler=transformers) for module {self.name!r}"
            )
        self._end_token_ids = self._folder.end_token_ids | frozenset(end_token_ids)
        self._max_model_len = max_model_len or self._folder.max_positions
        dtype = self._folder.dtype if dtype == "auto" else dtype
        arguments: dict[str, Any] = {
            "model": str(self._folder.path),
            "dtype": dtype,
            "max_model_len": self._max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "seed": self.context.seed % 2**31,
            # The distribution a token was drawn from; vLLM's default ignores the temperature.
            "logprobs_mode": "processed_logprobs",
            # Sampling is what the settings of a call say, not what the folder suggests.
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
        }
        if self._on_cpu:
            whole = self._folder.cache_bytes_per_token(dtype) * -(-self._max_model_len // 32) * 32
            wanted = min(max(whole * max_num_seqs, CPU_CACHE_BYTES_MIN), CPU_CACHE_BYTES_MAX)
            arguments |= {
                "kv_cache_memory_bytes": kv_cache_memory_bytes or max(wanted, 2 * whole),
                "block_size": CPU_BLOCK_SIZE,
                "enforce_eager": True,  # compiling takes 20 s and gains a tenth
                # A prompt computed in parts sets back the generator of its request, which a CPU's
                # cannot do (0.32): every request here has a seed.
                "enable_chunked_prefill": False,
            }
        else:
            arguments["gpu_memory_utilization"] = gpu_memory_utilization
        self._prepare_process()
        with warnings.catch_warnings(), self._uncompiled():
            warnings.simplefilter("ignore")  # of vLLM's imports; none is the user's to heed
            # One line about the missing Triton, which nothing on CPU uses.
            logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
            vllm: Any = importlib.import_module("vllm")
            if self._on_cpu:
                _register_here(vllm, self._folder.config.get("architectures") or [])
            try:
                self._llm = vllm.LLM(**(arguments | engine_args))
            except (AssertionError, NotImplementedError, ValueError) as e:
                raise self._refusal(e) from e

    def _refusal(self, cause: Exception) -> UserError:
        """What to do about an engine that did not start."""
        if "memory" in str(cause):
            return ResourcesError(
                f"vLLM has too little memory for module {self.name!r}: {cause}. Lower"
                " max_model_len or max_num_seqs, or set kv_cache_memory_bytes"
            )
        # It speaks of what a model needs and it cannot do by assertions, too.
        return ConfigError(
            f"vLLM refuses the model in {str(self._folder.path)!r} for module {self.name!r}, or one"
            f" of its engine arguments ({type(cause).__name__}: {str(cause) or 'without a word'}):"
            " change the argument, or use TorchPolicy (sampler=transformers)"
        )

    def _prepare_process(self) -> None:
        """What vLLM reads from the environment, once, when it is imported."""
        # A load of weights takes tensors as they are: the engine must be in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # one process: no need to ask a network
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if self._on_cpu:
            # Bound to cores, replicas on one machine would all take the same ones.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("OMP_NUM_THREADS", str(self.context.num_threads))
            torch.set_num_threads(self.context.num_threads)

    @property
    def _has_own_model(self) -> bool:
        return self._llm is None and self.__dict__.get("model") is not None

    @property
    def _on_cpu(self) -> bool:
        return self.context.device == "cpu"

    def _uncompiled(self) -> AbstractContextManager[object]:
        # On CPU vLLM compiles small functions at its first request: 17 s, and no call is faster.
        return torch.compiler.set_stance("force_eager") if self._on_cpu else nullcontext()

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._max_model_len

    def _engine(self) -> Any:
        if self._llm is None:
            raise ConfigError(
                f"module {self.name!r} has no engine: call self.setup_engine(path) in the setup of"
                f" {type(self).__name__}"
            )
        if self._broken is not None:
            raise SyncError(
                f"the engine of module {self.name!r} cannot be used any more ({self._broken}):"
                " replace this replica"
            )
        return self._llm

    def _reset_prefix_cache(self) -> None:
        if self._llm.reset_prefix_cache() is not True:
            self._broken = "its prefix cache could not be cleared, so a request was still running"
            self._engine()

    # ---- sampling ---------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        settings: GenerationSettings,
    ) -> list[Completion]:
        """One completion for each prompt, in order; the same call gives the same bits.

        Args:
            prompt_ids: token ids of each prompt; a prompt may come several times.
            seeds: one for each prompt, in [0, 2**31).

        Raises:
            DataError: a prompt is empty, or leaves no room for `settings.max_new_tokens`.
            SyncError: an earlier call failed inside the engine.
        """
        engine = self._engine()
        check_request(
            prompt_ids,
            seeds=seeds,
            settings=settings,
            max_model_len=self._max_model_len,
            module=self.name,
        )
        if not prompt_ids:
            return []
        # A warm cache would change what is computed together, hence bits.
        self._reset_prefix_cache()
        params = [self._sampling_params(settings, seed) for seed in seeds]
        return [
            self._completion(output.outputs[0]) for output in self._run(engine, prompt_ids, params)
        ]

    def _run(self, engine: Any, sequences: Sequence[Sequence[int]], params: Any) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        # An engine that raised has requests left in it, or is dead.
        self._broken = "it failed while it sampled"
        with self._uncompiled():
            outputs: list[Any] = engine.generate(prompts, params, use_tqdm=False)
        self._broken = None
        return outputs

    def _sampling_params(self, settings: GenerationSettings, seed: int) -> Any:
        ends = () if settings.ignore_eos else self._end_token_ids
        vllm: Any = importlib.import_module("vllm")
        return vllm.SamplingParams(
            seed=seed,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            stop=list(settings.stop),
            # The end tokens are given here, all of them, so that no other source adds any.
            stop_token_ids=sorted({*ends, *settings.stop_token_ids}),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,  # lists of numbers, not an object for every token
            detokenize=bool(settings.stop),
            skip_clone=True,  # one object for each request, and a copy takes as long as a token
        )

    def _completion(self, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise TransientError(
                f"vLLM ended a request of module {self.name!r} with {output.finish_reason!r},"
                " expected 'stop' or 'length'"
            )
        ids, flat = list(output.token_ids), output.logprobs
        # At each position the token that was drawn comes first.
        logprobs = [flat.logprobs[start] for start in flat.start_indices]
        assert [flat.token_ids[start] for start in flat.start_indices] == ids
        return Completion(ids=ids, logprobs=logprobs, finish_reason=output.finish_reason)

    # ---- weights ----------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes new weights, all of them, under their Hugging Face names and in any precision.

        Raises:
            SyncError: as `receiving_weights`.
        """
        if self._has_own_model:
            super().load_weights(weights)
            return
        given = list(weights)
        with self._reloading([kind_of(name, tensor) for name, tensor in given]) as take:
            take(given)

    def receiving_weights(self, kinds: Sequence[TensorKind]) -> AbstractContextManager[TakeWeights]:
        """Has vLLM load each layer once its weights are there, in any precision.

        Names and shapes are checked before the engine is touched: a load that fails half-way
        leaves an engine that dies at the next request, so it is not used again.

        Raises:
            SyncError: these are not this model's weights (nothing was changed), or the engine
                failed while it took them (every later call says so).
        """
        if self._has_own_model:
            return super().receiving_weights(kinds)
        if is_overridden(type(self), "load_weights", beside="receiving_weights"):
            return self._collecting()
        return self._reloading(kinds)

    @contextmanager
    def _reloading(self, kinds: Sequence[TensorKind]) -> Iterator[TakeWeights]:
        engine = self._engine()
        self._folder.check_shapes({name: shape for name, _, shape in kinds})

        def take(weights: Sequence[tuple[str, Tensor]]) -> None:
            # It keeps what comes until the layer is complete.
            is_all = len(weights) == len(kinds)
            copies = ((name, tensor if is_all else tensor.clone()) for name, tensor in weights)
            engine.collective_rpc(_take_weights, args=(copies,))

        self._broken = "a load of weights failed half-way"
        try:
            if self._on_cpu:
                engine.apply_model(_unpack_experts)
            engine.collective_rpc(_begin_reload)
            yield take
            engine.collective_rpc(_finish_reload)
        except SyncError:  # of whom the weights come from
            raise
        except Exception as e:  # whatever it was, the engine is lost
            raise SyncError(
                f"the engine of module {self.name!r} failed while it took new weights ({e}):"
                " replace this replica"
            ) from e
        if self._on_cpu:
            engine.apply_model(_pack_heads)
        self._broken = None
        # Keys and values of the old weights would be read for prompts seen before.
        self._reset_prefix_cache()

    def vocabulary_size(self) -> int:
        """Rows of the embedding; 0 before `setup_engine`."""
        if self._has_own_model:
            return super().vocabulary_size()
        return 0 if self._llm is None else self._folder.vocabulary_size

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities [len - 1] of each sequence's tokens after its first, at temperature 1.

        A sequence has 2 to `max_model_len - 1` tokens.
        """
        if self._has_own_model:
            return super().probe_logprobs(sequences)
        engine = self._engine()
        vllm: Any = importlib.import_module("vllm")
        longest = max(map(len, sequences), default=0)
        if longest >= self._max_model_len:
            raise DataError(
                f"a sequence of {longest} tokens was to be probed, but the engine of module"
                f" {self.name!r} takes {self._max_model_len} with one to spare: raise max_model_len"
            )
        self._reset_prefix_cache()
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        outputs = self._run(engine, sequences, params)
        return [
            [at[i].logprob for at, i in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
            for o, ids in zip(outputs, sequences, strict=True)
        ]


def _register_here(vllm: Any, architectures: Sequence[str]) -> None:
    """Imports the model's class in this process, on CPU.

    The first time it meets a class, vLLM looks at it in a process of its own, for the sake of CUDA;
    that takes 9 s, and each replica of a fresh machine would do it.
    """
    for name in architectures:
        known = vllm.ModelRegistry.models.get(name)
        if known is not None:
            vllm.ModelRegistry.register_model(name, known.load_model_cls())


def _begin_reload(worker: Any) -> None:
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")
    with _configured(worker):
        reload.initialize_layerwise_reload(worker.get_model())


def _take_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    with _configured(worker):
        worker.get_model().load_weights(weights)


def _finish_reload(worker: Any) -> None:
    """With what the worker's own `reload_weights` does after it (vllm 0.32)."""
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")
    runner = worker.model_runner
    with _configured(worker):
        reload.finalize_layerwise_reload(worker.get_model(), runner.vllm_config.model_config)
        runner.reset_lora_state()
        runner.reset_encoder_cache()
        runner.reset_mm_cache()


def _configured(worker: Any) -> AbstractContextManager[None]:
    config: Any = importlib.import_module("vllm.config")
    return config.set_current_vllm_config(worker.vllm_config)  # type: ignore[no-any-return]


def _unpack_experts(model: torch.nn.Module) -> None:
    """Has a load of weights pack the matrices of experts, on CPU.

    vLLM packs them when it builds the kernel of their layer, which it does once; a later load would
    leave them as they come, and the kernel would read nonsense, without an error (vllm 0.32).
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_heads(model: torch.nn.Module) -> None:
    """Packs the output head anew, on CPU.

    vLLM computes logits there from a packed copy of the head's weight. Where the head is tied to
    the embedding, a reload replaces that weight and leaves the copy as it was (vllm 0.32).
    """
    vllm: Any = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    for module in model.modules():
        if isinstance(module, vllm.ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
