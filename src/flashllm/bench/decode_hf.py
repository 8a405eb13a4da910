# SPDX-License-Identifier: Apache-2.0
"""Measures what users of the package transformers run: ``generate`` with a static cache, whose steps it compiles."""

from __future__ import annotations

import gc
import time
from typing import Any

from flashllm.bench import decode
from flashllm.bench.decode import Case, Sizes, Times
from flashllm.bench.decode_memory import MemoryPlan
from flashllm.bench.decode_rows import DecodeRow
from flashllm.bench.decode_systems import Subject, taken_since
from flashllm.bench.decode_torch import import_torch
from flashllm.bench.decode_torch_system import leaving_out, row_of_torch, skipped_graphs, torch_on_gpu, torch_plan
from flashllm.bench.decode_weights import DENSE
from flashllm.errors import MissingDependencyError
from flashllm.models.config import ModelConfig
from flashllm.progress import Advance

_DEVICE = "cuda"
_WARM_RUNS = 2  # each allocates its own cache: where that is other memory than before, graphs are recorded again


class HfSystem:
    """Implements :class:`flashllm.bench.decode_systems.System`. Each step is a CUDA graph; Python runs between them."""

    label = "hf-static"

    def __init__(self, subject: Subject) -> None:
        """Raises ``MissingDependencyError`` without PyTorch or transformers, or where no GPU is seen."""
        self._torch, self._transformers = torch_on_gpu(), import_transformers()
        self._subject = subject
        self._model: Any = None
        self._free = 0

    def plan(self, case: Case) -> MemoryPlan:
        """As :class:`System` says. All prompts are read at once."""
        return torch_plan(self._subject.config, case, rows=case.batch * case.prompt)

    def load(self, advance: Advance) -> None:
        """As :class:`System` says. The package's own random weights, made on the GPU."""
        from flashllm.device import free_memory

        self._free = free_memory()
        config, torch = self._subject.config, self._torch
        kind = torch.float16 if self._subject.dtype == "fp16" else torch.bfloat16
        with leaving_out(), torch.device(_DEVICE):
            self._model = new_model(config, kind)
        advance("weights", config.layers)

    def row(self, case: Case) -> DecodeRow:
        """As :class:`System` says."""
        try:
            with leaving_out():
                return self._measured(case)
        finally:
            self._forget()

    def close(self) -> None:
        """As :class:`System` says."""
        self._model = None
        self._forget()

    def _measured(self, case: Case) -> DecodeRow:
        torch, config, skipped = self._torch, self._subject.config, skipped_graphs()
        prompts = torch.tensor(decode.random_prompts(config.vocab, case), device=_DEVICE)
        for _ in range(_WARM_RUNS):
            generate(self._model, prompts, case.output)
        _, times = generate(self._model, prompts, case.output)
        weights = sum(int(one.nbytes) for one in self._model.parameters())
        plan = self.plan(case)
        return row_of_torch(
            self._subject,
            case,
            Sizes(
                matrices=plan.matrices,
                head=int(self._model.get_output_embeddings().weight.nbytes),
                weights=weights,
                cache=plan.cache,
                workspace=torch.cuda.memory_reserved() - weights - plan.cache,
            ),
            times,
            system=self.label,
            format=DENSE,
            kernels=f"transformers {self._transformers.__version__} generate, static cache, "
            f"torch {torch.__version__} compiled forward, Python between tokens",
            captured=skipped_graphs() == skipped,
            peak_bytes=taken_since(self._free),
        )

    def _forget(self) -> None:
        """Drop compiled steps, whose graphs hold memory, and return memory that is no longer used to the driver."""
        self._torch.compiler.reset()
        if self._model is not None:
            self._model.__dict__.pop("_compiled_call", None)
        gc.collect()
        self._torch.cuda.empty_cache()


class _FirstToken:
    """A stopping criterion that never stops; it records when the first token is there, the only time it waits."""

    def __init__(self) -> None:
        self.seen = 0.0
        """Time of the first token, in seconds of ``time.perf_counter``."""

    def __call__(self, tokens: Any, scores: Any, **options: Any) -> Any:
        if not self.seen:
            _wait_for(tokens)
            self.seen = time.perf_counter()
        return tokens.new_zeros(len(tokens), dtype=import_torch().bool)


def generate(model: Any, prompts: Any, output: int) -> tuple[Any, Times]:
    """A tensor of ``prompts`` [B, T], each followed by ``output`` tokens, and how long generating it took."""
    clock = _FirstToken()
    _wait_for(prompts)
    begun = time.perf_counter()
    tokens = model.generate(
        prompts,
        attention_mask=import_torch().ones_like(prompts),
        cache_implementation="static",
        max_new_tokens=output,
        do_sample=False,
        stopping_criteria=import_transformers().StoppingCriteriaList([clock]),
    )
    _wait_for(tokens)
    ended = time.perf_counter()
    return tokens, Times(total=(ended - begun) * 1e3, first=(clock.seen - begun) * 1e3)


def _wait_for(tensor: Any) -> None:
    if tensor.is_cuda:
        import_torch().cuda.synchronize()


def new_model(config: ModelConfig, kind: Any) -> Any:
    """A model of the package with random weights of PyTorch's type ``kind``, on PyTorch's default device."""
    transformers = import_transformers()
    made = transformers.AutoConfig.for_model(**hf_config(config))
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=kind, attn_implementation="sdpa").eval()
    # A random model may choose the end or padding token anywhere.
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of ``config.json`` that describes a model to the package transformers."""
    common: dict[str, Any] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.is_opt:
        return {**common, "ffn_dim": config.ffn, "word_embed_proj_dim": config.hidden}
    scaling = config.rope_llama3
    if scaling is not None:
        rope: dict[str, Any] | None = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    else:
        rope = {"rope_type": "linear", "factor": config.rope_linear} if config.rope_linear != 1 else None
    return {
        **common,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "sliding_window": None,
    }


def import_transformers() -> Any:
    """The package. Raises ``MissingDependencyError``."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f'{error}: pip install "flashllm[finetune]"') from error
    return transformers
