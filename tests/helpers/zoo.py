"""Small networks of the kinds that users bring, in float64, each with the episodes it takes."""

import torch
from torch import Tensor, nn

from imaml_dist.tasks.episode import EpisodeBatch

WAY, SHOT, QUERY, TOKENS, VOCABULARY = 3, 2, 3, 5, 17


class Encoder(nn.Module):
    """A transformer encoder over token sequences: embedding, learned positions in a buffer, attention, dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.register_buffer("positions", 0.1 * torch.randn(TOKENS, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, WAY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.positions).mean(1))


class ResNetBlock(nn.Module):
    """A residual block with batch normalisation that keeps running statistics, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm0, self.norm1, self.norm2 = (nn.BatchNorm2d(4) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(4, WAY)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(torch.nn.functional.silu(self.norm1(self.conv1(x)))))
        return self.head(torch.nn.functional.silu(x + y).mean((2, 3)))


class Tied(nn.Module):
    """One weight in two places, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(16, 6, bias=False)
        self.decode = nn.Linear(6, 16, bias=False)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().T.clone())
        self.again = nn.Linear(16, 6, bias=False)
        self.again.weight = self.encode.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, WAY)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.decode(torch.tanh(self.encode(x.flatten(1)))))))
        return self.head(self.frozen(hidden))


class Dropped(nn.Module):
    """Dropout of units and of channels, and group and layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Dropout2d(0.25),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(8, WAY),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


ZOO = {"transformer": Encoder, "resnet": ResNetBlock, "tied": Tied, "dropout": Dropped}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name]().double().train()


class Episodes:
    """Tokens for the transformer, 4 x 4 images for the others; classes differ by a pattern drawn per task."""

    def __init__(self, name: str) -> None:
        self.tokens = name == "transformer"

    def episodes(self, step: int, tasks: range) -> EpisodeBatch:
        parts = []
        for task in tasks:
            generator = torch.Generator().manual_seed(7919 * step + task)
            y = torch.arange(WAY).repeat_interleave(SHOT), torch.arange(WAY).repeat_interleave(QUERY)
            if self.tokens:
                patterns = torch.randint(0, VOCABULARY, (WAY, TOKENS), generator=generator)
                x = [patterns[labels].clone() for labels in y]
                for drawn in x:  # one token of every sequence is noise
                    drawn[:, 0] = torch.randint(0, VOCABULARY, drawn.shape[:1], generator=generator)
            else:
                patterns = torch.randn(WAY, 1, 4, 4, generator=generator, dtype=torch.float64)
                noise = [torch.randn(len(labels), 1, 4, 4, generator=generator, dtype=torch.float64) for labels in y]
                x = [patterns[labels] + 0.3 * n for labels, n in zip(y, noise, strict=True)]
            parts.append((x[0], y[0], x[1], y[1]))
        index = torch.tensor(list(tasks))
        stacked = (torch.stack(p) for p in zip(*parts, strict=True))
        return EpisodeBatch(*stacked, index=index, key=1_000 * step + index)
