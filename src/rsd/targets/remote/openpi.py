"""Any server in openpi's protocol as a policy, whoever wrote it: what its LIBERO client sends, and what it answers.

On connecting the server says its metadata, any map. An episode is a connection: the protocol has no reset message.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import numpy as np
from PIL import Image

from rsd.chunks import environment_ready
from rsd.conventions import REPLAN_STEPS
from rsd.targets.remote.client import CorrectedPolicy, RemotePolicy
from rsd.targets.remote.connection import Connection
from rsd.targets.remote.request import IMAGES, PROMPT, STATE
from rsd.targets.remote.wire import pack, unpack
from rsd.types import RSD_ASYNC, TARGET_ONLY, ActionChunk, ChunkStats, Observation, RsdError, check_observation

RENDER_SIZE, SENT_SIZE = 256, 224  # pixels a side: what openpi's LIBERO client renders, and what it sends
SPECULATION = "speculation"  # in the metadata of a proxy, beside those of the server behind it
OF_RSD = {"decode", "image_size", "chunk", "images"}  # metadata of an `rsd serve`
WANTED = "a policy server in openpi's protocol"


class OpenpiPolicy:
    """The policy of such a server. `reset` connects anew and insists on the same metadata."""

    decode, image_size = TARGET_ONLY, RENDER_SIZE

    def __init__(self, address: str, steps: int | None = None, timeout_s: float = 60.0) -> None:
        """steps: so many actions of each answer are executed, by default as openpi's client does; of fewer none."""
        self.address, self._steps = address, steps or REPLAN_STEPS
        self._connection = Connection(address, timeout_s, WANTED)
        self.metadata, self._used = read_metadata(address, self._connection.open()), False

    def reset(self, seed: int | None = None) -> None:
        """A new episode; nothing tells the server of a seed."""
        if self._used or not self._connection.is_open:
            self._connection.close()
            found, self._used = read_metadata(self.address, self._connection.open()), False
            if not same(found, self.metadata):
                self.close()
                said = f"{found!s:.300}; expected {self.metadata!s:.300}"
                raise RsdError(f"{self.address}: another policy is served there now: {said}")

    def predict(self, observation: Observation) -> ActionChunk:
        """latency_ms: `total` is the whole round trip, `network` what of it the server does not account for."""
        observation = check_observation(observation)
        start = time.perf_counter()
        message = pack(openpi_message(observation))
        self._used = True
        answer = unpack(self._connection.ask(message), whose=self.address)
        total = 1e3 * (time.perf_counter() - start)
        if not isinstance(answer, dict) or "actions" not in answer:
            found = ", ".join(map(str, answer)) if isinstance(answer, dict) else type(answer).__name__
            raise RsdError(f"{self.address}: expected an answer with the key actions, found {found:.200}")
        actions = environment_ready(answer["actions"], self.address, self._steps)
        latency, timing = {"total": total}, answer.get("server_timing")
        inferred = timing.get("infer_ms") if isinstance(timing, dict) else None
        if isinstance(inferred, int | float | np.number) and 0 <= inferred <= total:
            latency = {"network": total - float(inferred), **latency}
        return ActionChunk(actions, ChunkStats(self.decode, prefills=1, latency_ms=latency), self._steps)

    def close(self) -> None:
        self._connection.close()


def openpi_message(observation: Observation) -> dict[str, Any]:
    """An observation as openpi's LIBERO client sends it: square images resized by PIL's bilinear filter."""
    views = {key: _resized(view) for key, view in zip(IMAGES, observation.images, strict=True)}
    return {**views, STATE: observation.state, PROMPT: observation.instruction}


def _resized(view: np.ndarray) -> np.ndarray:
    if view.shape[0] == SENT_SIZE:
        return view
    return np.asarray(Image.fromarray(view).resize((SENT_SIZE, SENT_SIZE), Image.Resampling.BILINEAR))


def read_metadata(address: str, message: bytes | str) -> dict[str, Any]:
    """What the server said first; `RsdError` unless it is a map."""
    content = unpack(message, whose=address) if isinstance(message, bytes) else message
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RsdError(f"{address}: expected {WANTED}, which says its metadata first, found {content!r:.200}")
    return content


def same(one: Any, other: Any) -> bool:
    return pack({"": one}) == pack({"": other})


def plain(value: Any) -> Any:
    """Metadata as JSON has it: arrays become lists."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def is_rsd(metadata: dict[str, Any]) -> bool:
    """Whether an `rsd serve` says them."""
    return metadata.keys() >= OF_RSD and SPECULATION not in metadata


def identity_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """What names the policy behind these metadata, as far as they tell."""
    policy = metadata.get("policy")
    return dict(policy) if is_rsd(metadata) and isinstance(policy, dict) else {"metadata": plain(metadata)}


def metadata_at(address: str) -> dict[str, Any]:
    """What the server there says first."""
    with closing(Connection(address, 60.0, WANTED)) as connection:
        return read_metadata(address, connection.open())


def served_at(address: str, steps: int | None = None) -> RemotePolicy | OpenpiPolicy:
    """The policy at an address: an `rsd serve` with all that it tells, or any other server."""
    if not is_rsd(metadata := metadata_at(address)):
        return OpenpiPolicy(address, steps)
    remote = (CorrectedPolicy if metadata["decode"] == RSD_ASYNC else RemotePolicy)(address)
    served = remote.welcome.execute or remote.welcome.chunk[0]
    if steps not in (None, served):
        remote.close()
        found = f"executes {served} actions of a chunk, found --execute {steps}"
        raise RsdError(f"{address}: this `rsd serve` {found}, which cannot be chosen here; give it to `rsd serve`")
    return remote
