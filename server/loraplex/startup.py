"""Everything that is built once, before the first request: device, base model, memory, engine."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from loraplex_kernels.dispatch import cpu_ops, interpreted_ops, multiplies_codes
from loraplex_kernels.granules import GRANULE_RANK
from loraplex_kernels.native import is_built
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.stack import StepLimits
from loraplex_kernels.tables import AdapterTables

from loraplex.adapters.loader import AdapterLoader, Blobs, as_is
from loraplex.adapters.packing import Layout, PackedAdapter, place
from loraplex.adapters.peft import BaseLinear
from loraplex.adapters.pool import AdapterPool
from loraplex.adapters.tiers import HostTier, num_bytes
from loraplex.api.protocols import Limits, ModelInfo
from loraplex.config import ServeConfig, format_size
from loraplex.device import (
    INTERPRETER,
    Device,
    available_cores,
    choose_device,
    free_host_memory,
    free_memory,
)
from loraplex.engine.arena import Arena
from loraplex.engine.graphs import MAX_BYTES as GRAPH_BYTES
from loraplex.engine.model_runner import BlockShape, ModelRunner, RunnerConfig, block_shape
from loraplex.engine.pace import Pace
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.speculation import MAX_DRAFT_ROWS, PromptLookup
from loraplex.errors import StartupError
from loraplex.model import nf4
from loraplex.model.checkpoint import Checkpoint, base_identity
from loraplex.model.config import MODULES, ModelConfig, read_model_config
from loraplex.model.decoder import Activations, Decoder
from loraplex.model.generation import GenerationDefaults, read_generation_defaults
from loraplex.model.hub import resolve_model
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex.model.nf4_cache import NF4Cache
from loraplex.model.tokenizer import Tokenizer
from loraplex.progress import progress_bar

if TYPE_CHECKING:
    from loraplex_kernels.cases import ModelShapes

log = logging.getLogger(__name__)

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
    device: Device

    @property
    def linears(self) -> dict[str, BaseLinear]:
        return {shape.name: BaseLinear(*shape) for shape in self.config.adaptable()}


@dataclass(frozen=True, slots=True)
class Memory:
    """The arena: so many blocks of this shape; and what adapters may take of the host's memory."""

    num_blocks: int
    block: BlockShape
    host_bytes: int

    @property
    def size(self) -> int:
        return self.num_blocks * self.block.size

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block.tokens


def load_base(config: ServeConfig) -> Base:
    """Find, read and quantise the model; ModelError says what is wrong with it."""
    device = choose_device(config.device, config.dtype)
    torch.set_num_threads(config.threads or available_cores())
    folder = resolve_model(config.model, config.cache)
    trained = read_model_config(folder)
    model = _with_context(trained, config.context_length)
    checkpoint = Checkpoint(folder)
    settings = {"model": asdict(trained), "quantization": nf4.SETTINGS}
    identity = base_identity(checkpoint, settings, config.cache / "identities")
    ops = _build_ops(config, model, device)  # before the weights take its memory
    # A GPU makes its own codes, and quicker than a disk would give them.
    cache = NF4Cache(config.cache / "nf4", identity) if device.where.type == "cpu" else None
    options = LoadOptions(device.where, device.dtype, _weight_form(model, device, ops), cache)
    with progress_bar(f"Loading {config.model}") as progress:
        decoder = load_decoder(checkpoint, model, options, progress)
    if cache is not None:
        cache.save()
    return Base(
        name=folder.resolve().name if Path(config.model).is_dir() else Path(config.model).name,
        identity=identity,
        config=model,
        defaults=read_generation_defaults(folder),
        tokenizer=Tokenizer.load(folder),
        decoder=decoder,
        ops=ops,
        device=device,
    )


def _build_ops(config: ServeConfig, model: ModelConfig, device: Device) -> Ops:
    if device.name == "cpu":
        return _build_cpu_ops(config.cache / "native")
    if device.name == INTERPRETER:
        return interpreted_ops()
    try:
        from loraplex_kernels.gpu.trusted import triton_ops
    except ModuleNotFoundError as error:
        log.warning("the GPU's ops run in plain torch, which is slower: %s is missing", error.name)
        return TorchOps()
    with progress_bar("Checking the kernels on this GPU") as progress:
        shapes = _shapes(config, model)
        return triton_ops(
            device.where, shapes, device.dtype, config.max_rank, config.cache, progress
        )


def _build_cpu_ops(cache: Path) -> Ops:
    if is_built(cache):
        return cpu_ops(cache)
    log.info("compiling the CPU's ops, once, into %s", cache)
    with progress_bar("Compiling the CPU's ops, once"):
        return cpu_ops(cache)


def _shapes(config: ServeConfig, model: ModelConfig) -> "ModelShapes":
    from loraplex.shapes import shapes_of  # brings bitsandbytes, which a CPU may do without

    return shapes_of(config.model, model)


def _with_context(model: ModelConfig, wanted: int | None) -> ModelConfig:
    if wanted is None:
        return model
    if wanted > model.context_length:
        raise StartupError(
            f"--context-length {wanted}: the model was trained for {model.context_length}"
        )
    return replace(model, context_length=wanted)


def _weight_form(model: ModelConfig, device: Device, ops: Ops) -> WeightForm:
    """On a CPU whose ops do not multiply codes a dequantised copy, where there is room for it."""
    if device.name != "cpu":
        return WeightForm.PACKED
    weights = sum(shape.out_features * shape.in_features for shape in model.linears())
    size = weights * device.dtype.itemsize
    if multiplies_codes(ops, device.dtype):
        log.info(
            "serving from the 4-bit codes, by this CPU's matrix tiles: no dequantised copy of %s",
            format_size(size),
        )
        return WeightForm.PACKED
    if size > free_host_memory() // 2:
        log.info("serving from the 4-bit codes: a dequantised copy takes %s", format_size(size))
        return WeightForm.PACKED
    log.info("serving from a dequantised copy of the 4-bit weights: %s", format_size(size))
    return WeightForm.DENSE


def plan_memory(config: ServeConfig, base: Base) -> Memory:
    """What is taken of the memory; StartupError names the setting that asks for too much.

    Or for too little: then not one short request would fit.
    """
    dtype, where = base.decoder.dtype, base.device.where
    block = block_shape(base.config, dtype, dtype)
    free = free_memory(where)
    tables = _table_memory(config, base)
    if tables > free // 4:
        raise StartupError(
            f"--max-slots {config.max_slots} is too large: the tables of so many slots take "
            f"{format_size(tables)} of the {format_size(free)} that are free"
        )
    free = max(0, free - tables - _working_memory(config, base))
    size = config.memory if config.memory is not None else _default_memory(where, free)
    if size > free:
        raise StartupError(
            f"--memory {format_size(size)} cannot be had: {format_size(free)} are free, beside "
            "what the steps need"
        )
    num_blocks = size // block.size
    if num_blocks < 2:
        raise StartupError(
            f"--memory {format_size(size)} is too small: this model needs at least "
            f"{format_size(2 * block.size)}"
        )
    host_free = free_host_memory() if where.type == "cuda" else free - size
    return Memory(num_blocks, block, _plan_host_memory(config, host_free))


def warn_of_little(base: Base, memory: Memory) -> None:
    """Where the arena holds less than what is common: one whole context, one adapter."""
    missing = []
    if memory.capacity_tokens < base.config.context_length:
        missing.append(
            f"only {memory.capacity_tokens} tokens of a context of {base.config.context_length}"
        )
    if _common_adapter_blocks(base, memory.block.size) > memory.num_blocks:
        missing.append(f"no adapter of rank {GRANULE_RANK} on all modules")
    if missing:
        log.warning("--memory %s holds %s", format_size(memory.size), " and ".join(missing))


def _common_adapter_blocks(base: Base, block_bytes: int) -> int:
    dtype = base.decoder.dtype
    form = base.ops.granule_form(dtype)
    sizes = [
        form.num_bytes(features, dtype)
        for linear in base.config.linears()
        for features in (linear.in_features, linear.out_features)
    ]
    return place(sizes, block_bytes)[1]


def _plan_host_memory(config: ServeConfig, free: int) -> int:
    size = free // 4 if config.host_memory is None else config.host_memory
    if size > free:
        raise StartupError(
            f"--host-memory {format_size(size)} cannot be had: {format_size(free)} are free"
        )
    return size


def _table_memory(config: ServeConfig, base: Base) -> int:
    """Bytes of the tables in which kernels find each slot's weights."""
    tables = AdapterTables(
        config.max_slots,
        base.config.num_layers,
        len(MODULES),
        config.max_rank,
        torch.device("meta"),
    )
    parts = (tables.offset, tables.scale, tables.num_granules, tables.output_scale)
    return sum(part.nbytes for part in parts)


def _working_memory(config: ServeConfig, base: Base) -> int:
    """Bytes that will be taken after the arena, on its device."""
    model, dtype, nowhere = base.config, base.device.dtype, torch.device("meta")
    activations = Activations.allocate(
        model,
        dtype,
        nowhere,
        config.max_step_tokens,
        config.max_running + _max_drafts(config, base),
    )
    if base.device.name != "cuda":
        fused = base.decoder.fused(base.ops)
        scratch = 0 if fused is None else fused.num_bytes(_step_limits(config, base))
        return activations.num_bytes + scratch
    linears = _shapes(config, model).linears
    largest = max(linear.out_features * linear.in_features for linear in linears)
    dequantized = largest * dtype.itemsize
    # One weight in our scratch, one in bitsandbytes' own.
    return activations.num_bytes + 2 * dequantized + config.cuda_graphs * GRAPH_BYTES


def _step_limits(config: ServeConfig, base: Base) -> StepLimits:
    return StepLimits(
        max_rows=config.max_step_tokens,
        max_logits=config.max_running + _max_drafts(config, base),
        max_sequences=config.max_running,
        context_length=base.config.context_length,
        max_rank=config.max_rank,
    )


def _default_memory(device: torch.device, free: int) -> int:
    return int(free * 0.9) if device.type == "cuda" else min(free // 4, MAX_CPU_ARENA)


def _max_drafts(config: ServeConfig, base: Base) -> int:
    """Of one step. None where steps are replayed as CUDA graphs: those have one row a sequence."""
    if not config.speculation or (base.device.name == "cuda" and config.cuda_graphs):
        return 0
    return min(MAX_DRAFT_ROWS, config.max_running * config.max_draft_tokens)


def build_scheduler(config: ServeConfig, base: Base, memory: Memory) -> Scheduler:
    arena = Arena(memory.num_blocks)
    limits = SchedulerConfig(
        memory.block.tokens, config.max_running, config.max_step_tokens, config.prefix_cache
    )
    max_drafts = _max_drafts(config, base)
    speculator = PromptLookup(config.max_draft_tokens, max_drafts) if max_drafts else None
    pool, pace = AdapterPool(arena, config.max_slots), Pace(config.prefill_share)
    return Scheduler(arena, pool, limits, pace, speculator)


def build_host_tier(base: Base, memory: Memory) -> HostTier[PackedAdapter]:
    is_pinned = base.device.name == "cuda"
    return HostTier(memory.host_bytes, _pinned_bytes if is_pinned else num_bytes)


def build_loader(config: ServeConfig, base: Base, memory: Memory, blobs: Blobs) -> AdapterLoader:
    is_pinned = base.device.name == "cuda" and memory.host_bytes > 0
    return AdapterLoader(
        blobs,
        base.linears,
        layout_of(base, memory),
        config.max_rank,
        base.decoder.base_weight,
        _pinned if is_pinned else as_is,
    )


def _pinned(packed: PackedAdapter) -> PackedAdapter:
    """Where copies to the device can start from."""
    try:
        return replace(packed, data=packed.data.pin_memory())
    except RuntimeError as error:
        log.warning("an adapter is kept in memory that is not pinned: %s", error)
        return packed


def _pinned_bytes(packed: PackedAdapter) -> int:
    """Torch takes pinned memory in powers of two."""
    return 1 << (packed.num_bytes - 1).bit_length()


def build_runner(config: ServeConfig, base: Base, memory: Memory) -> ModelRunner:
    sizes = RunnerConfig(
        num_blocks=memory.num_blocks,
        max_slots=config.max_slots,
        max_rank=config.max_rank,
        max_rows=config.max_step_tokens,
        max_running=config.max_running,
        max_drafts=_max_drafts(config, base),
        device=base.device.where,
    )
    try:
        runner = ModelRunner(base.decoder, base.ops, sizes)
        if base.device.name != INTERPRETER:  # where a step takes a minute
            runner.warm_up()
    except torch.OutOfMemoryError:
        raise StartupError("--memory leaves too little for the steps themselves") from None
    except Exception as error:
        raise StartupError(f"a trial step failed on this device: {error}") from error
    if base.device.name == "cuda" and config.cuda_graphs:
        _capture_graphs(runner, base.ops)
    return runner


def _capture_graphs(runner: ModelRunner, ops: Ops) -> None:
    if not ops.can_be_captured:
        log.warning("no CUDA graphs: some ops run in torch, in forms that no graph can hold")
        return
    with progress_bar("Capturing CUDA graphs") as progress:
        runner.capture_graphs(progress)


def layout_of(base: Base, memory: Memory) -> Layout:
    dtype = base.decoder.dtype
    return Layout(memory.block.size, dtype, base.ops.granule_form(dtype))


def model_info(config: ServeConfig, base: Base, memory: Memory) -> ModelInfo:
    """What requests are checked against and GetServerInfo tells."""
    return ModelInfo(
        name=base.name,
        base_id=base.identity,
        architecture=base.config.architecture,
        device=base.device.name,
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
    return f"{base.device.name}, nf4, {format_size(memory.size)} for KV and adapters"
