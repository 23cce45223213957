"""The adapters of one request: held from its first token to its last, and what they make of it."""

import hashlib
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.adapters.store import AdapterRecord, require_rank
from loraplex.api.protocols import StoreLike
from loraplex.engine.sequence import BlendPart
from loraplex.errors import InvalidRequestError, RequestError

_GRANULE = 16  # ranks that a slot's table holds at a time


class Target(NamedTuple):
    """What a sequence is told of its adapters; see `Sequence`."""

    digest: str | None
    blend: tuple[BlendPart, ...]
    adapter_start: int


class _Wanted(NamedTuple):
    adapter_id: str
    version: str  # "": whichever the name has
    weight: float
    field: str  # where in the request it stands, up to the last dot


@dataclass(frozen=True, slots=True)
class Adaptation:
    """The records of the adapters that a request names, in its order."""

    records: tuple[AdapterRecord, ...]
    weights: tuple[float, ...]  # of a blend, one for each record; else none

    def used(self) -> list[pb.UsedAdapter]:
        return [pb.UsedAdapter(adapter_id=r.adapter_id, version=r.version) for r in self.records]

    def target(self, prompt: Seq[int]) -> Target:
        if self.weights:
            parts = self._parts()
            return Target(blend_digest(parts), parts, 0)
        if not self.records:
            return Target(None, (), 0)
        (record,) = self.records
        if not record.invocation_tokens:
            return Target(record.version, (), 0)
        start = last_occurrence(record.invocation_tokens, prompt)
        # PEFT's calculate_alora_offsets: not invoked in the prompt, it acts nowhere.
        return Target(None, (), 0) if start is None else Target(record.version, (), start)

    def _parts(self) -> tuple[BlendPart, ...]:
        """By version, whatever the order of the names; those of one version are one."""
        weights: defaultdict[str, float] = defaultdict(float)
        for record, weight in zip(self.records, self.weights, strict=True):
            weights[record.version] += weight
        return tuple(BlendPart(version, weight) for version, weight in sorted(weights.items()))


def named_adapters(request: pb.GenerateRequest) -> str:
    """For logs and messages."""
    return request.adapter_id or "+".join(member.adapter_id for member in request.blend)


@asynccontextmanager
async def adaptation(
    request: pb.GenerateRequest, store: StoreLike, max_rank: int
) -> AsyncIterator[Adaptation]:
    """The versions that serve the whole request, kept even if their names go away meanwhile."""
    records: list[AdapterRecord] = []
    try:
        for wanted in _wanted(request):
            records.append(store.acquire(wanted.adapter_id))
            _check_version(records[-1], wanted)
            require_rank(records[-1], max_rank)
        if request.blend:
            _check_blend(records, max_rank)
        weights = tuple(member.weight for member in request.blend)
        yield Adaptation(tuple(records), weights)
    finally:
        for record in records:
            store.release(record.version)


def _wanted(request: pb.GenerateRequest) -> Iterator[_Wanted]:
    if request.adapter_id:
        yield _Wanted(request.adapter_id, request.adapter_version, 1.0, "")
    for index, member in enumerate(request.blend):
        name, version = member.adapter_id, member.adapter_version
        yield _Wanted(name, version, member.weight, f"blend[{index}].")


def _check_version(record: AdapterRecord, wanted: _Wanted) -> None:
    if wanted.version and wanted.version != record.version:
        raise RequestError(
            "VERSION_MISMATCH",
            f"{record.adapter_id} is at version {record.version} now",
            field=f"{wanted.field}adapter_version",
            metadata={"adapter_id": record.adapter_id, "version": record.version},
        )


def _check_blend(records: Seq[AdapterRecord], max_rank: int) -> None:
    """What cannot be computed as the weighted sum of the members' updates, or fits no slot."""
    for index, record in enumerate(records):
        kind = "a DoRA" if record.use_dora else "an activated LoRA"
        if record.use_dora or record.invocation_tokens:
            raise InvalidRequestError(
                f"blend[{index}].adapter_id",
                f"{record.adapter_id} is {kind}, which cannot be part of a blend",
            )
    rank, limit = sum(_rounded(record.rank) for record in records), _rounded(max_rank)
    if rank > limit:
        raise InvalidRequestError(
            "blend",
            f"its members' ranks, each rounded up to {_GRANULE}, are {rank} together;"
            f" this server holds {limit} (--max-rank)",
        )


def _rounded(rank: int) -> int:
    return -(-rank // _GRANULE) * _GRANULE


def blend_digest(parts: Seq[BlendPart]) -> str:
    """The identity of a blend: of its members' versions and weights, to the last bit."""
    digest = hashlib.sha256(b"blend")
    for version, weight in parts:
        digest.update(bytes.fromhex(version) + struct.pack("<d", weight + 0.0))  # no -0.0
    return digest.hexdigest()


def last_occurrence(wanted: Seq[int], tokens: Seq[int]) -> int | None:
    """Where `wanted` begins for the last time in `tokens`.

    From the end, and in time linear in both whatever they hold (Knuth, Morris and Pratt).
    """
    pattern = wanted[::-1]
    borders = _borders(pattern)
    matched = 0
    for start in range(len(tokens) - 1, -1, -1):
        token = tokens[start]
        while matched and pattern[matched] != token:
            matched = borders[matched - 1]
        matched += pattern[matched] == token
        if matched == len(pattern):
            return start
    return None


def _borders(pattern: Seq[int]) -> list[int]:
    """For each beginning of `pattern`, the length of its longest beginning that also ends it."""
    borders = [0]
    for token in pattern[1:]:
        length = borders[-1]
        while length and pattern[length] != token:
            length = borders[length - 1]
        borders.append(length + (pattern[length] == token))
    return borders
