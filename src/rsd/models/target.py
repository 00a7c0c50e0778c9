"""The compact VLA: prefix (images, words, proprioception), then a block of H query positions per level.

Block l = 1..L is told what levels < l decode to, and returns, for every scalar, logits of t_l given t_<l and
a continuous estimate of what is still missing. Attention is causal across blocks and full within one, so one
pass over several teacher-forced blocks returns all their conditionals: parallel verification. Block 1 rides
in the prefill. A target with a `whole_block` can be conditioned on a whole draft in the place of block 1: a pass no
wider. Next-scale prediction as in VAR (arXiv 2404.02905), here over action residuals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rsd.models.config import TargetConfig
from rsd.models.fusing import fusible
from rsd.models.streams import together
from rsd.models.text import TextEncoder
from rsd.models.trunk import KVCache, Trunk
from rsd.models.vision import CameraEncoder
from rsd.tokenizer.rfsq import RfsqConfig
from rsd.types import ACTION_DIM, CAMERAS, STATE_DIM

STATE_FEATURES = STATE_DIM + 3  # position 3, two columns of the rotation matrix 6, gripper 2
FOURIER = 4  # octaves in which a prefix value is shown to a block
OCTAVES = torch.tensor([[2.0**k] for k in range(FOURIER)])  # which no precision rounds


class BlockEmbedding(nn.Module):
    """Query positions of a level's block: what the levels so far decode to, level, position, gripper."""

    octaves: Tensor

    def __init__(self, dim: int, horizon: int, motion_dim: int, levels: int) -> None:
        super().__init__()
        self.value = nn.Linear(motion_dim * (1 + 2 * FOURIER), dim)
        self.level = nn.Parameter(torch.randn(levels + 1, dim) * 0.02)  # the last: conditioned on a whole draft
        self.position = nn.Parameter(torch.randn(horizon, dim) * 0.02)
        self.gripper = nn.Embedding(3, dim)  # open, close, not yet known
        self.register_buffer("octaves", OCTAVES, persistent=False)
        self.motion_dim = motion_dim

    @fusible
    def forward(self, prefixes: Tensor, gripper: Tensor | None, first_level: int) -> Tensor:
        """prefixes [B, n, H*M] in first steps, gripper int [B, H] or None where it is to be found -> [B, n*H, D].

        n blocks at once, first_level, first_level + 1, ...: one call instead of n keeps a GPU busy."""
        grid = prefixes.unflatten(-1, (-1, self.motion_dim))  # [B, n, H, M]
        angles = torch.pi * grid.unsqueeze(-2) * self.octaves  # [B, n, H, F, M]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)
        value = self.value(torch.cat([grid, waves], dim=-1).to(self.value.weight.dtype))
        opened, closed, unknown = self.gripper.weight
        # a choice, not a gather, whose backward sorts its indices
        told = unknown if gripper is None else torch.where(gripper.bool()[:, None, :, None], closed, opened)
        blocks = grid.shape[1]
        level = self.level[first_level - 1 : first_level - 1 + blocks, None]  # [n, 1, D]
        return (value + told + (level + self.position)).flatten(1, 2)


class LevelHead(nn.Module):
    """Features of blocks -> logits of their levels' symbols."""

    def __init__(self, dim: int, motion_dim: int, levels: int, symbols: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, dim, motion_dim * symbols) * dim**-0.5 * 0.1)
        self.bias = nn.Parameter(torch.zeros(levels, motion_dim * symbols))
        self.symbols = symbols

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Features [B, H, D] of block `level` -> logits [B, H*M, K]."""
        logits = features @ self.weight[level - 1] + self.bias[level - 1]
        return logits.unflatten(-1, (-1, self.symbols)).flatten(1, 2)

    def first_levels(self, features: Tensor) -> Tensor:
        """Features [B, n, H, D] of the blocks 1..n -> logits [B, n, H*M, K]: `forward` of each, in one product."""
        count = features.shape[1]
        logits = torch.einsum("blhd,ldk->blhk", features, self.weight[:count]) + self.bias[:count, None]
        return logits.unflatten(-1, (-1, self.symbols)).flatten(2, 3)


class BlockTarget(nn.Module, ABC):
    """What stands behind the prefix of any target: blocks of query positions and the heads that read them.

    Values of motion scalars are in units of the tokenizer's first step D_1. `state_mean`, `state_std` [11] normalise
    the state features and are stored with the weights. A subclass makes the prefix and runs it through a `trunk`: the
    three abstract methods."""

    state_mean: Tensor
    state_std: Tensor
    trunk: nn.Module

    def __init__(self, code: RfsqConfig, horizon: int, motion_dim: int, whole_block: bool = False) -> None:
        super().__init__()
        self.code, self.horizon, self.motion_dim, self.whole_block = code, horizon, motion_dim, whole_block
        self.register_buffer("state_mean", torch.zeros(STATE_FEATURES))
        self.register_buffer("state_std", torch.ones(STATE_FEATURES))

    def _add_blocks(self, dim: int, trunk: Callable[[], nn.Module]) -> None:
        """The parts behind the prefix, last: the order of parts is that of a training's saved state."""
        levels, symbols = self.code.levels, self.code.symbols
        self.block = BlockEmbedding(dim, self.horizon, self.motion_dim, levels)
        self.trunk = trunk()
        self.level_head = LevelHead(dim, self.motion_dim, levels, symbols)
        self.parallel_head = nn.Linear(dim, levels * self.motion_dim * symbols)
        self.gripper_head = nn.Linear(dim, 1)
        self.residual_head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, self.motion_dim))

    # what a target has of its own

    @abstractmethod
    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word ids [B, 32] -> language tokens [B, N, Dt], condition [B, Dt]; constant over an episode."""

    @abstractmethod
    def embed_prefix(self, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """images [B, 2, 3, S, S] in [-0.5, 0.5], state features [B, 11 or more], encoded text -> prefix [B, N, D]."""

    @abstractmethod
    def _prefill(self, prefix: Tensor, queries: Tensor, apart: bool = False) -> tuple[list[Tensor], KVCache]:
        """Prefix and query positions in one pass -> features of each block, the cache; apart: no block sees another."""

    # the prefix

    def normalise(self, state: Tensor) -> Tensor:
        """State features [B, 11 or more], of which the first 11 in standard deviations of the training data."""
        return (state[:, :STATE_FEATURES] - self.state_mean) / self.state_std

    def prefill(self, prefix: Tensor) -> tuple[Tensor, KVCache]:
        """prefix [B, N, D] -> features of block 1 [B, H, D] and the cache of N + H positions."""
        (features,), cache = self.prefill_blocks(prefix, [], None)
        return features, cache

    def prefill_blocks(
        self, prefix: Tensor, prefixes: list[Tensor], gripper: Tensor | None, first_level: int = 2
    ) -> tuple[list[Tensor], KVCache]:
        """`prefill` and `extend` from first_level on in ONE pass: features of block 1 and of the n others, the cache.

        prefixes: what n blocks are told, each [B, H*M] in first steps; gripper int [B, H], needed if n > 0."""
        return self._prefill(prefix, self._queries(prefix, prefixes, gripper, first_level))

    def prefill_blind(self, prefix: Tensor, value: Tensor) -> tuple[list[Tensor], KVCache]:
        """`prefill` and `prefill_whole` in ONE pass: features of block 1, which is told nothing, and of the block that
        is told the draft, value [B, H*M]; both see the prefix and themselves alone, as in passes of their own."""
        nothing = torch.zeros_like(value).unsqueeze(1)
        blocks = self.block(nothing, None, 1), self.block(value.unsqueeze(1), None, self.code.levels + 1)
        return self._prefill(prefix, torch.cat(blocks, dim=1), apart=True)

    def prefill_whole(self, prefix: Tensor, value: Tensor) -> tuple[Tensor, KVCache]:
        """`prefill` with a block in the place of block 1 that is told what a whole draft decodes to, value [B, H*M] in
        first steps, and finds the gripper itself -> its features [B, H, D] and the cache of N + H positions."""
        (features,), cache = self._prefill(prefix, self.block(value.unsqueeze(1), None, self.code.levels + 1))
        return features, cache

    def remembered(self, length: int) -> int:
        """How many positions of the cache after a prefix of `length` a visual drafter may read: those that are the same
        whatever was drafted, the prefix and block 1, which not every pass of a target with a `whole_block` has."""
        return length if self.whole_block else length + self.horizon

    def _queries(self, prefix: Tensor, prefixes: list[Tensor], gripper: Tensor | None, first_level: int) -> Tensor:
        """Query positions of block 1, which is told nothing, and of n others, [B, (n+1)*H, D]."""
        nothing = torch.zeros(len(prefix), 1, self.horizon * self.motion_dim, device=prefix.device)
        queries = self.block(nothing, None, 1)
        if not prefixes:
            return queries
        return torch.cat([queries, self.block(torch.stack(prefixes, dim=1), gripper, first_level)], dim=1)

    def _block_mask(self, blocks: int, device: torch.device, apart: bool = False) -> Tensor:
        """bool [n*H, n*H], True = may attend: causal across blocks (apart: none across), full within one."""
        own = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()
        own = own & own.T if apart else own
        return own.repeat_interleave(self.horizon, 0).repeat_interleave(self.horizon, 1)

    # blocks

    def extend(self, prefixes: list[Tensor], gripper: Tensor | None, first_level: int, cache: KVCache) -> list[Tensor]:
        """ONE pass over the blocks first_level, first_level+1, ...

        prefixes: per block [B, H*M], what the levels above it decode to, in first steps; gripper int [B, H], None for
        the block that is conditioned on a whole draft (`whole`).
        Returns features [B, H, D] per block. The cache must hold the prefix and the blocks before; those between 1
        and first_level are left out where a draft is judged as a whole."""
        count, h = len(prefixes), self.horizon
        x = self.block(torch.stack(prefixes, dim=1), gripper, first_level)
        mask = None
        if count > 1:
            own = self._block_mask(count, x.device)
            mask = torch.cat([own.new_ones(count * h, cache.length), own], dim=1)
        return list(self.trunk(x, cache, mask).split(h, dim=1))

    def whole(self, value: Tensor, cache: KVCache, length: int) -> Tensor:
        """The block of `prefill_whole` in a pass of its own, after a prefix of `length`, which is all it sees of the
        cache -> its features [B, H, D]."""
        seen = KVCache(list(cache.keys), list(cache.values))
        seen.truncate(length)
        (features,) = self.extend([value], None, self.code.levels + 1, seen)
        return features

    def logits(self, features: Tensor, level: int) -> Tensor:
        """Features [B, H, D] of block `level` -> logits [B, H*M, K] of its symbols."""
        return self.level_head(features, level)

    @fusible
    def parallel_logits(self, features: Tensor) -> Tensor:
        """Features of block 1 [B, H, D] -> logits [B, L, H*M, K] of all levels (the original RFSQ head)."""
        shape = (self.code.levels, self.motion_dim, self.code.symbols)
        grid = self.parallel_head(features).unflatten(-1, shape)
        return grid.transpose(1, 2).flatten(2, 3)  # [B, H, L, M, K] -> [B, L, H*M, K]

    def gripper_logits(self, features: Tensor) -> Tensor:
        """Features of block 1 [B, H, D] -> logits [B, H] that the gripper closes."""
        return self.gripper_head(features).squeeze(-1)

    @fusible
    def residual(self, features: Tensor, level: int) -> Tensor:
        """Features of block `level` -> estimate [B, H*M] of what its prefix still misses, in first steps."""
        return self.residual_head(features).flatten(1) * (2.0 * self.code.weight(level))

    def residuals(self, features: Tensor) -> Tensor:
        """Features [B, n, H, D] of the blocks 1..n -> `residual` of each [B, n, H*M]."""
        missing = self.residual_head(features).flatten(2).unbind(1)
        return torch.stack([part * (2.0 * self.code.weight(k)) for k, part in enumerate(missing, start=1)], dim=1)


class TargetModel(BlockTarget):
    """The compact target: two cameras' encoders, which the instruction conditions, words and the state as prefix."""

    trunk: Trunk

    def __init__(self, config: TargetConfig, code: RfsqConfig, horizon: int, motion_dim: int) -> None:
        super().__init__(code, horizon, motion_dim, config.whole_block)
        self.config, dim = config, config.dim
        self.text = TextEncoder(config.text_dim, config.text_tokens)
        self.cameras = nn.ModuleList(CameraEncoder(config.channels, config.text_dim) for _ in CAMERAS)
        side, last = config.image_size // 16, config.channels[-1]
        self.image_in = nn.ModuleList(nn.Linear(n**2 * last, dim) for n in config.merge)
        self.image_position = nn.ParameterList(
            [nn.Parameter(torch.randn((side // n) ** 2, dim) * 0.02) for n in config.merge]
        )
        self.text_in = nn.Linear(config.text_dim, dim)
        self.state_in = nn.Sequential(nn.Linear(STATE_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self._add_blocks(dim, lambda: Trunk(dim, config.layers, config.heads, dropout=config.dropout))
        self.grounding_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1)) if config.grounded else None
        self.committed_in = nn.Linear(horizon * (ACTION_DIM + 1), dim, bias=False) if config.committed else None
        if self.committed_in is not None:
            nn.init.zeros_(self.committed_in.weight)  # a policy that knew nothing of it begins as it was

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(ids)

    def embed_prefix(self, images: Tensor, state: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        tokens, condition = text
        cameras = [partial(self._embed_image, index, images[:, index], condition) for index in range(len(self.cameras))]
        return torch.cat(together([*cameras, partial(self._embed_rest, tokens, state)], images.device), dim=1)

    @fusible
    def _embed_rest(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Language tokens and the state as one token, [B, n + 1, D]."""
        robot = self.state_in(self.normalise(state))
        if self.committed_in is not None and state.shape[1] > STATE_FEATURES:
            robot = robot + self.committed_in(state[:, STATE_FEATURES:])
        return torch.cat([self.text_in(tokens), robot[:, None]], dim=1)

    def _embed_image(self, index: int, image: Tensor, condition: Tensor) -> Tensor:
        """One camera's tokens [B, n, D]."""
        features = merged(self.cameras[index](image, condition), self.config.merge[index])
        return self.image_in[index](features) + self.image_position[index]

    def grounding_logits(self, prefix: Tensor) -> Tensor:
        """prefix [B, N, D] -> logits [B, n] over the first camera's n positions, row by row from the top: where what is
        asked for is seen. After two thirds of the layers, so that the rest can act on it."""
        assert self.grounding_head is not None
        hidden = self.trunk.lower(prefix, KVCache(), max(1, 2 * len(self.trunk.layers) // 3))
        return self.grounding_head(hidden[:, : len(self.image_position[0])]).squeeze(-1)

    def _prefill(self, prefix: Tensor, queries: Tensor, apart: bool = False) -> tuple[list[Tensor], KVCache]:
        cache = KVCache()
        sequence, mask = self._together(prefix, queries, apart)
        hidden = self.trunk(sequence, cache, mask)
        return list(hidden[:, prefix.shape[1] :].split(self.horizon, dim=1)), cache

    @fusible
    def _together(self, prefix: Tensor, queries: Tensor, apart: bool = False) -> tuple[Tensor, Tensor]:
        """Prefix and query positions as one sequence, and which may attend to which; apart: no block to another."""
        length, total = prefix.shape[1], prefix.shape[1] + queries.shape[1]
        mask = torch.ones(total, total, dtype=torch.bool, device=prefix.device)
        # the prefix does not see the queries: its cache is the same for all decoders
        mask[:length, length:] = False
        mask[length:, length:] = self._block_mask(queries.shape[1] // self.horizon, prefix.device, apart)
        return torch.cat([prefix, queries.to(prefix.dtype)], dim=1), mask


def merged(tokens: Tensor, n: int) -> Tensor:
    """[B, s*s, C] -> [B, s*s/n^2, n^2*C]: n x n neighbouring tokens side by side in the channels, nothing is lost."""
    if n == 1:
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    grid = tokens.unflatten(1, (side // n, n, side // n, n))  # [B, s/n, n, s/n, n, C]
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def committed_features(actions: Tensor, count: Tensor) -> Tensor:
    """Actions [B, H, A] of which the first count [B] are committed -> [B, H*(A+1)], which follow a state's features:
    those actions, and which they are (training-time action conditioning, arXiv 2512.05964)."""
    told = (torch.arange(actions.shape[1], device=actions.device) < count[:, None]).float()[..., None]
    return torch.cat([actions * told, told], dim=-1).flatten(1)


def state_features(state: Tensor) -> Tensor:
    """8-d state [B, 8] (position, axis-angle, gripper) -> [B, 11]: the rotation as two matrix columns.

    The axis-angle jumps where the angle passes pi, which a gripper pointing down does all the time; the
    matrix does not (6-d rotation, Zhou et al. 2019)."""
    position, rotation, gripper = state[:, :3], state[:, 3:6], state[:, 6:]
    angle = rotation.norm(dim=1, keepdim=True)
    axis = (rotation / angle.clamp_min(1e-8)).unsqueeze(1)  # [B, 1, 3]
    sin, cos = torch.sin(angle).unsqueeze(1), torch.cos(angle).unsqueeze(1)
    # Rodrigues: R e = e cos + (n x e) sin + n (n.e)(1 - cos)
    e = torch.eye(3, device=state.device)[None, :2]
    dot = (axis * e).sum(2, keepdim=True)  # [B, 2, 1]
    columns = e * cos + torch.linalg.cross(axis, e) * sin + axis * dot * (1 - cos)  # [B, 2, 3]
    return torch.cat([position, columns.flatten(1), gripper], dim=1)
