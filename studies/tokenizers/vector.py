"""Learned vector codes from `vector-quantize-pytorch`: residual VQ, and ResidualFSQ inside an autoencoder."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import GroupedResidualFSQ, ResidualVQ

from studies.tokenizers.codecs import Motion
from studies.tokenizers.entropy import Ints
from studies.tokenizers.learned import LearnConfig, Refiner, mlp, train, train_refiner

VQ_BATCH = 4096
REFINER_CHUNKS = 60_000  # what the learned decoder is trained on
REFINER_REACH = 6.0  # a correction may be this many times the residual's standard deviation


class ResidualVq:
    """k-means per level on the whole chunk as one vector, codebooks by moving average (arXiv 2107.03312)."""

    def __init__(self, training: Motion, alphabet: int, levels: int, steps: int) -> None:
        torch.manual_seed(0)
        self.levels, self.alphabet, self.shape = levels, alphabet, training.shape[1:]
        data = torch.from_numpy(training).flatten(1)
        self.vq = ResidualVQ(
            dim=data.shape[1],
            num_quantizers=levels,
            codebook_size=alphabet,
            kmeans_init=True,
            kmeans_iters=10,
            decay=0.9,
            threshold_ema_dead_code=1,
        )
        with torch.no_grad():
            for step in range(steps):
                self.vq(data[torch.randint(len(data), (VQ_BATCH * (2 if step == 0 else 1),))])
        self.vq.eval().requires_grad_(False)
        self.books = self.vq.codebooks  # [L, K, P]
        self.refiner: Refiner | None = None

    def _prefixes(self, indices: Tensor) -> Tensor:
        """indices [N, L] -> what each prefix decodes to [N, L, P]."""
        return torch.stack([self.books[level][indices[:, level]] for level in range(self.levels)], 1).cumsum(1)

    def fit_refiner(self, training: Motion, config: LearnConfig) -> None:
        """Put a learned decoder on top, of the size and the training that ours has. The tokens stay what they are."""
        data = torch.from_numpy(training).flatten(1)
        with torch.no_grad():
            sample = data[: VQ_BATCH * 4]
            spread = (self._prefixes(self.vq(sample)[1]) - sample[:, None]).std((0, 2))
        self.refiner = Refiner(data.shape[1], (2 * REFINER_REACH * spread).tolist(), config.hidden)
        some = data[:: 1 + len(data) // REFINER_CHUNKS]
        tokens = torch.from_numpy(self.encode(some.reshape(-1, *self.shape).numpy()))

        def decode_prefix(rows: Tensor, levels: Tensor) -> Tensor:
            return self._prefixes(tokens[rows])[torch.arange(len(rows)), levels - 1]

        train_refiner(self.refiner, some, decode_prefix, config)

    @torch.no_grad()
    def encode(self, motion: Motion) -> Ints:
        parts = torch.from_numpy(motion).flatten(1).split(VQ_BATCH)
        return torch.cat([self.vq(part)[1] for part in parts]).numpy()

    @torch.no_grad()
    def decode(self, codes: Ints, levels: int) -> Motion:
        indices = torch.from_numpy(codes[:, :levels])
        value = torch.stack([self.books[level][indices[:, level]] for level in range(levels)]).sum(0)
        if self.refiner is not None:
            value = self.refiner(value, levels)
        return value.reshape(-1, *self.shape).numpy()

    def tokens(self, codes: Ints, levels: int) -> Ints:
        return codes[:, :levels]

    symbols = tokens


class ResidualFsq(nn.Module):
    """Chunk autoencoder with the library's ResidualFSQ on its latents, in groups of 4, trained end to end."""

    GROUP = (7, 7, 7, 7)

    def __init__(self, training: Motion, latents: int, levels: int, config: LearnConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.levels, self.alphabet, self.shape = levels, int(np.prod(self.GROUP)), training.shape[1:]
        width, groups = training[0].size, latents // len(self.GROUP)
        self.encoder, self.decoder = mlp(width, config.hidden, latents), mlp(latents, config.hidden, width)
        self.fsq = GroupedResidualFSQ(
            dim=latents, groups=groups, levels=list(self.GROUP), num_quantizers=levels, quantize_dropout=True
        )
        data = torch.from_numpy(training).flatten(1)

        def loss(sample: Tensor, generator: torch.Generator) -> Tensor:
            quantised, _ = self.fsq(self.encoder(sample).unsqueeze(1))  # a sequence of one
            return F.mse_loss(self.decoder(quantised.squeeze(1)), sample)

        self.train()
        train(self, data, loss, config)
        self.eval()

    @torch.no_grad()
    def encode(self, motion: Motion) -> Ints:
        """-> [N, L, G]."""
        _, indices = self.fsq(self.encoder(torch.from_numpy(motion).flatten(1)).unsqueeze(1))  # [G, N, 1, L]
        return indices.squeeze(2).permute(1, 2, 0).numpy()

    @torch.no_grad()
    def decode(self, codes: Ints, levels: int) -> Motion:
        indices = torch.from_numpy(codes).permute(2, 0, 1).unsqueeze(2).clone()
        indices[..., levels:] = -1  # the library's mark of a level left out
        latents = self.fsq.get_output_from_indices(indices).squeeze(1)
        return self.decoder(latents).reshape(-1, *self.shape).numpy()

    def tokens(self, codes: Ints, levels: int) -> Ints:
        return codes[:, :levels].reshape(len(codes), -1)

    def symbols(self, codes: Ints, levels: int) -> Ints:
        """The digits of one latent, of all levels, as one number: [N, latents]."""
        base = self.GROUP[0]
        digits = [codes[:, :levels] // base**place % base for place in range(len(self.GROUP))]
        stacked = np.stack(digits, -1).reshape(len(codes), levels, -1)
        return (stacked * base ** np.arange(levels)[:, None]).sum(1)


def count_parameters(codec: object) -> int:
    """Learned numbers of a codec: weights and codebooks."""
    nets = [value for value in vars(codec).values() if isinstance(value, nn.Module)]
    if isinstance(codec, nn.Module):
        nets.append(codec)
    tensors = itertools.chain.from_iterable(itertools.chain(net.parameters(), net.buffers()) for net in nets)
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())
