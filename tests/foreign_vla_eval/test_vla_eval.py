"""A policy as vla-eval's model server, asked by vla-eval's own client."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.connection import Connection
from vla_eval.specs import DimSpec, check_specs

from rsd.policy import RsdPolicy
from rsd.serving.vla_eval import RsdModelServer, serve_vla_eval
from rsd.types import Observation


def sent(seen: Observation) -> dict[str, Any]:
    """As vla-eval's LIBERO sends it."""
    views = dict(zip(("agentview", "wrist"), seen.images, strict=True))
    return {"images": views, "states": seen.state.astype(np.float64), "task_description": seen.instruction}


def asked(server: RsdModelServer, talk: Callable[[str], Any]) -> Any:
    """What `talk(address)` finds out while the server runs."""

    async def main() -> Any:
        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(serve_vla_eval(server, "127.0.0.1", 0, stop, address.set_result))
        found = await talk(await address)
        stop.set()
        await serving
        return found

    return asyncio.run(main())


def test_every_session_has_the_actions_of_an_episode_of_its_own(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation]
) -> None:
    own = make_policy("rsd-fused")

    async def talk(address: str) -> Any:
        async with Connection(address) as one, Connection(address) as other:
            found: list[list[np.ndarray]] = [[], []]
            for _ in range(2):  # episodes
                for client in (one, other):
                    await client.start_episode({})
                for step in range(2 * own.execute):  # two chunks, the second with a memory
                    for session, client in enumerate((one, other)):
                        answer = await client.act(sent(make_observation(100 * session + step)))
                        found[session].append(answer["actions"])
                for client in (one, other):
                    await client.end_episode({})
            return found, one.server_info

    found, info = asked(RsdModelServer(own.core), talk)
    for session, actions in enumerate(found):
        for episode in range(2):
            own.reset()
            chunks = [own.predict(make_observation(100 * session + step)) for step in (0, own.execute)]
            expected = np.concatenate([chunk.executed for chunk in chunks])
            steps = slice(episode * len(expected), (episode + 1) * len(expected))
            np.testing.assert_array_equal(actions[steps], expected)
    parameters = info["observation_params"]
    libero = LIBEROBenchmark(**parameters)  # which takes all of them
    server = [
        {key: DimSpec.from_dict(one) for key, one in info[kind].items()} for kind in ("action_spec", "observation_spec")
    ]
    assert not check_specs(server[0], libero.get_action_spec(), server[1], libero.get_observation_spec())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": {}}, "expected agentview, wrist, found"),
        ({"states": np.zeros(7)}, r"state: expected \[8\], found \[7\]"),
        (
            {"images": {"agentview": np.zeros((8, 9, 3), np.uint8), "wrist": np.zeros((8, 8, 3), np.uint8)}},
            "square image",
        ),
    ],
)
def test_an_odd_observation_is_an_error_and_the_session_goes_on(
    make_policy: Callable[..., RsdPolicy], make_observation: Callable[..., Observation], change: Any, expected: str
) -> None:
    async def talk(address: str) -> Any:
        async with Connection(address) as client:
            await client.start_episode({})
            with pytest.raises(RuntimeError, match=expected):
                await client.act({**sent(make_observation(0)), **change})
            return await client.act(sent(make_observation(0)))

    own = make_policy("rsd-fused")
    found = asked(RsdModelServer(own.core), talk)
    own.reset()
    np.testing.assert_array_equal(found["actions"], own.predict(make_observation(0)).actions[0])
