"""Everything that is built once, before the first request: device, base model, memory, engine."""

import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from loraplex_kernels.dispatch import choose_ops
from loraplex_kernels.ops import Ops

from loraplex.adapters.packing import Layout
from loraplex.adapters.peft import BaseLinear
from loraplex.adapters.pool import AdapterPool
from loraplex.api.protocols import Limits, ModelInfo
from loraplex.config import ServeConfig, format_size
from loraplex.engine.arena import Arena
from loraplex.engine.model_runner import BlockShape, ModelRunner, RunnerConfig, block_shape
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.errors import StartupError
from loraplex.model import nf4
from loraplex.model.checkpoint import Checkpoint, base_identity
from loraplex.model.config import ModelConfig, read_model_config
from loraplex.model.decoder import Decoder
from loraplex.model.generation import GenerationDefaults, read_generation_defaults
from loraplex.model.hub import resolve_model
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex.model.tokenizer import Tokenizer
from loraplex.progress import progress_bar

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_CPU_ARENA = 2 << 30


@dataclass(frozen=True, slots=True)
class Base:
    """The base model in memory, and what is known about it."""

    name: str
    identity: str
    config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    decoder: Decoder
    ops: Ops
    device: torch.device

    @property
    def linears(self) -> dict[str, BaseLinear]:
        return {shape.name: BaseLinear(*shape) for shape in self.config.linears()}


@dataclass(frozen=True, slots=True)
class Memory:
    """The arena: so many blocks of this shape."""

    num_blocks: int
    block: BlockShape

    @property
    def size(self) -> int:
        return self.num_blocks * self.block.size

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block.tokens


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device on this machine")
    if name not in ("cpu", "cuda"):
        raise StartupError(f"--device {name} is not served by this version (auto, cpu, cuda)")
    return torch.device(name)


def load_base(config: ServeConfig) -> Base:
    """Find, read and quantise the model; ModelError says what is wrong with it."""
    device = choose_device(config.device)
    dtype = DTYPES[config.dtype]
    if device.type == "cuda" and dtype is not torch.bfloat16:
        raise StartupError("--dtype float32 is for --device cpu")
    torch.set_num_threads(config.threads or available_cores())
    folder = resolve_model(config.model, config.cache)
    trained = read_model_config(folder)
    model = _with_context(trained, config.context_length)
    checkpoint = Checkpoint(folder)
    settings = {"model": asdict(trained), "quantization": nf4.SETTINGS}
    identity = base_identity(checkpoint, settings, config.cache / "identities")
    options = LoadOptions(device, dtype, _weight_form(model, device, dtype))
    with progress_bar(f"Loading {config.model}") as progress:
        decoder = load_decoder(checkpoint, model, options, progress)
    return Base(
        name=folder.resolve().name if Path(config.model).is_dir() else Path(config.model).name,
        identity=identity,
        config=model,
        defaults=read_generation_defaults(folder),
        tokenizer=Tokenizer.load(folder),
        decoder=decoder,
        ops=choose_ops(device, config.cache / "native"),
        device=device,
    )


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory() -> int:
    """Bytes that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _with_context(model: ModelConfig, wanted: int | None) -> ModelConfig:
    if wanted is None:
        return model
    if wanted > model.context_length:
        raise StartupError(
            f"--context-length {wanted}: the model was trained for {model.context_length}"
        )
    return replace(model, context_length=wanted)


def _weight_form(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> WeightForm:
    """A dequantised copy is the quickest on a CPU, where there is room for it."""
    if device.type != "cpu":
        return WeightForm.PACKED
    weights = sum(shape.out_features * shape.in_features for shape in model.linears())
    size = weights * dtype.itemsize
    if size > free_host_memory() // 2:
        log.info("serving from the 4-bit codes: a dequantised copy takes %s", format_size(size))
        return WeightForm.PACKED
    log.info("serving from a dequantised copy of the 4-bit weights: %s", format_size(size))
    return WeightForm.DENSE


def plan_memory(config: ServeConfig, base: Base) -> Memory:
    """The arena's size; StartupError when it cannot be had, or not one short request would fit."""
    dtype = base.decoder.dtype
    block = block_shape(base.config, dtype, dtype)
    free = free_memory(base.device)
    size = config.memory if config.memory is not None else _default_memory(base.device, free)
    if size > free:
        raise StartupError(
            f"--memory {format_size(size)} cannot be had: {format_size(free)} are free"
        )
    num_blocks = size // block.size
    if num_blocks < 2:
        raise StartupError(
            f"--memory {format_size(size)} is too small: this model needs at least "
            f"{format_size(2 * block.size)}"
        )
    return Memory(num_blocks, block)


def _default_memory(device: torch.device, free: int) -> int:
    return int(free * 0.85) if device.type == "cuda" else min(free // 4, MAX_CPU_ARENA)


def build_scheduler(config: ServeConfig, memory: Memory) -> Scheduler:
    arena = Arena(memory.num_blocks)
    limits = SchedulerConfig(memory.block.tokens, config.max_running, config.max_step_tokens)
    return Scheduler(arena, AdapterPool(arena, config.max_slots), limits)


def build_runner(config: ServeConfig, base: Base, memory: Memory) -> ModelRunner:
    sizes = RunnerConfig(
        num_blocks=memory.num_blocks,
        max_slots=config.max_slots,
        max_rank=config.max_rank,
        max_rows=config.max_step_tokens,
        max_running=config.max_running,
        device=base.device,
    )
    return ModelRunner(base.decoder, base.ops, sizes)


def layout_of(base: Base, memory: Memory) -> Layout:
    return Layout(memory.block.size, base.decoder.dtype)


def model_info(config: ServeConfig, base: Base, memory: Memory) -> ModelInfo:
    """What requests are checked against and GetServerInfo tells."""
    return ModelInfo(
        name=base.name,
        base_id=base.identity,
        architecture=base.config.architecture,
        device=base.device.type,
        dtype=str(base.decoder.dtype).removeprefix("torch."),
        context_length=base.config.context_length,
        vocab_size=base.config.vocab_size,
        eos_token_ids=base.defaults.eos_token_ids,
        default_sampling=base.defaults.sampling,
        kv_capacity_tokens=memory.capacity_tokens,
        limits=Limits(
            max_rank=config.max_rank,
            max_slots=config.max_slots,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_adapter_bytes=config.max_adapter_bytes,
            memory_bytes=memory.size,
            max_step_tokens=config.max_step_tokens,
        ),
    )


def describe(base: Base, memory: Memory) -> str:
    """For the ready line: device, quantisation, memory."""
    return f"{base.device.type}, nf4, {format_size(memory.size)} for KV and adapters"
