"""A policy as a model server of vla-eval (`vla-eval` 0.8.0, its protocol 1): for its own LIBERO and its clients.

vla-eval keeps the chunk and asks anew once it is used up; every session has an episode of its own here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from rsd.extras import extra
from rsd.serving.service import PolicyService, Servable, Session
from rsd.targets.remote.request import IMAGES, PROMPT, STATE, read_request
from rsd.types import CAMERAS, RsdError

with extra("vla-eval"):
    import anyio
    from vla_eval.model_servers.base import SessionContext
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.model_servers.serve import serve_async
    from vla_eval.specs import (
        GRIPPER_CLOSE_POS,
        IMAGE_RGB,
        LANGUAGE,
        POSITION_DELTA,
        ROTATION_AA,
        STATE_EEF_POS_AA_GRIP,
        DimSpec,
    )

STATES, INSTRUCTION = "states", "task_description"  # in vla-eval's observations


class RsdModelServer(PredictModelServer):
    """`predict` is called in one thread. What is wrong with an observation is answered as vla-eval's error."""

    def __init__(self, policy: Servable) -> None:
        steps = (service := PolicyService(policy)).warm_up()[0]
        super().__init__(chunk_size=policy.execute or steps)
        self._service, self._sessions = service, dict[str, Session]()

    def get_observation_params(self) -> dict[str, Any]:
        """What its LIBERO leaves out by default. The quaternion's sign as robosuite has it, as in training."""
        return {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True, "env_seed": 0}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        views = dict.fromkeys(CAMERAS, IMAGE_RGB)
        return {**views, "state": STATE_EEF_POS_AA_GRIP, "language": LANGUAGE}

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_end(result, ctx)
        self._sessions.pop(ctx.session_id, None)

    def predict(self, obs: Mapping[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """obs: upright images uint8 [S, S, 3] by camera, states [8], an instruction -> actions float32 [H, 7]."""
        session = self._sessions.setdefault(ctx.session_id, Session())
        if ctx.is_first:
            session.end_episode()
        policy = self._service.policy
        request = read_request(openpi_content(obs), policy.image_size, policy.cameras)
        assert request.observation is not None  # no reset is asked for
        chunk, _ = self._service.predict(session, request.observation)
        return {"actions": chunk.executed}


def openpi_content(obs: Mapping[str, Any]) -> dict[str, Any]:
    """vla-eval's observation under openpi's keys; `RsdError` for one without images, states or instruction."""
    images = obs.get("images")
    known = images if isinstance(images, Mapping) else {}
    lacking = [key for key in (STATES, INSTRUCTION) if key not in obs] + [key for key in CAMERAS if key not in known]
    if lacking:
        found = ", ".join(map(str, [*obs, *known]))
        remedy = "its LIBERO sends them to a server that asks for them (`vla-eval run`, observation_params)"
        raise RsdError(f"observation: expected {', '.join(lacking)}, found {found:.200}; {remedy}")
    views = {key: known[camera] for key, camera in zip(IMAGES, CAMERAS, strict=True)}
    return {**views, STATE: np.asarray(obs[STATES]), PROMPT: obs[INSTRUCTION]}


async def serve_vla_eval(
    server: RsdModelServer, host: str, port: int, stop: asyncio.Event, listening: Callable[[str], None]
) -> None:
    """Serve until `stop`; `listening` is told the address as soon as clients may connect."""
    async with anyio.create_task_group() as group:
        taken = await group.start(partial(serve_async, server, host, port))
        listening(f"ws://{host}:{taken}")
        await stop.wait()
        group.cancel_scope.cancel()
