"""Drawing tokens from hidden vectors without leaving the device: filters, inversion of the CDF, and the vocabulary screen.

Everything here has fixed shapes and no branch on data, so that it can be part of a compiled step.

Legend: `B` rows, `V` vocabulary, `E` embedding width, `R` rank of the screen, `C` entries of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from configs.errors import UserError

DEPTH = 32.0  # nats below the likeliest word: what is rarer has no chance of being drawn, and is never kept by a filter
QUARTERINGS = 8  # of DEPTH + 1: thresholds are found to 5e-4 nats
NEIGHBOURS = 8  # words, one behind the other in the table, that the screen takes together
WIDTHS = 16  # of which the 8-bit product's width must be a multiple: its kernel reads whole vectors, past the end if need be
BLOCK = 16  # entries of a running sum that are added up together


def _cut(weight: Tensor, share: Tensor, wanted: Tensor) -> Tensor:
    """The highest t with sum of share[weight >= t] >= wanted, (B, 1), to 5e-4 nats; weight (B, C) is at most 1.

    A search by quarters instead of a sort: 8 passes over a row that lies in the cache. A sort of 32k words takes 10 times as
    long, and halvings twice as long: a pass costs its start more than its sums.
    """
    low, step = torch.full_like(wanted, math.exp(-DEPTH)), DEPTH + 1
    for _ in range(QUARTERINGS):
        step /= 4
        quarters = [low * math.exp(i * step) for i in (1, 2, 3)]
        for quarter, enough in [(q, _sum(torch.where(weight >= q, share, 0.0)) >= wanted) for q in quarters]:
            low = torch.where(enough, quarter, low)  # what is enough at a quarter is at all lower ones
    return low


def _sum(x: Tensor) -> Tensor:
    """(B, C) -> (B, 1), first over BLOCK strided parts: many running sums instead of one, which would wait for itself."""
    return x.unflatten(-1, (BLOCK, -1)).sum(-2).sum(-1, keepdim=True)


def draw(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor, filters: tuple[bool, bool]
) -> Tensor:
    """One index a row: logits (B, C), all else (B,), uniform in [0, 1) -> (B,), by inverting the filtered CDF.

    As `student.sampler.pick`, each row with its own parameters: temperature 0 is greedy, top_k 0 is off, top_p 1 is off.
    filters: whether any row needs (top_p, top_k); what no row needs is left out of the graph.
    """
    logits, greedy = logits.float(), temperature[:, None] == 0
    scores = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature[:, None])  # (B, C), at most 0
    weight = torch.where(scores > torch.where(greedy, -1e-30, -DEPTH), scores.exp(), 0.0)
    weight = nn.functional.pad(weight, (0, -weight.shape[-1] % BLOCK))
    use_p, use_k = filters
    if use_k:
        count = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None].float()
        weight = torch.where(weight >= _cut(weight, torch.ones_like(weight), count), weight, 0.0)
    if use_p:
        cut = _cut(weight, weight, top_p[:, None] * _sum(weight))
        weight = torch.where(weight >= torch.where(top_p[:, None] < 1, cut, 0.0), weight, 0.0)
    return _invert(weight, torch.where(temperature > 0, uniform, 0.0))


def _invert(weight: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the running sum of weight (B, C) first exceeds uniform (B,) times the total; never one of weight 0."""
    blocks = weight.unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).double()  # (B, C / BLOCK); a GPU adds in another order for each sum: in float32 some would decrease
    cdf, below = sums.cumsum(-1), 1 - 2**-40
    target = torch.minimum(uniform[:, None] * cdf[:, -1:], cdf[:, -1:] * below)  # below the total: some sum exceeds it
    block = (cdf <= target).sum(-1, keepdim=True)  # (B, 1)
    inside = blocks[torch.arange(len(weight), device=weight.device), block[:, 0]].double().cumsum(-1)  # (B, BLOCK)
    rest = (target - cdf.gather(1, block) + sums.gather(1, block)).clamp(min=0.0)
    rest = torch.minimum(rest, inside[:, -1:] * below)
    return block[:, 0] * BLOCK + (inside <= rest).sum(-1)


class Vocabulary(nn.Module):
    """The exact vocabulary product: hidden vectors (B, E) -> logits (B, V) in float32, -inf for what no token stands for."""

    bias: Tensor  # (V,)

    def __init__(self, table: Tensor, never: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)  # (V, E)
        self.register_buffer("bias", torch.zeros(len(table)).masked_fill(never.cpu(), -torch.inf).to(table.device))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.table).float() + self.bias

    def bytes_read(self, rows: int) -> int:
        """Bytes of weights that one call for `rows` rows must read."""
        return self.table.nbytes

    def flops(self) -> float:
        """FLOPs of one call for one row."""
        return 2.0 * self.table.numel()


class Int8(Vocabulary):
    """The product with the table in 8 bits and one scale a row: half of bfloat16's bytes, and an error a little above its own.

    For few rows on a CPU, where reading the table is what takes the time: in large batches it is slower than the exact
    product, and a GPU reads fast enough. Hidden vectors of any type are multiplied as bfloat16: that kernel of torch's is
    quick on processors without bfloat16, too, the one for float32 slower than the exact product. The largest entry of a
    row becomes 127: clipping it instead, scales for blocks of a row, or a rotated table come to the same distribution
    within a fifth (docs/benchmarks.md).
    """

    def __init__(self, table: Tensor, never: Tensor) -> None:
        super().__init__(table, never)
        if table.device.type != "cpu":
            raise UserError(f"int8: expected a model on the CPU, got one on {table.device}; leave it out there")
        scale = (table.float().abs().amax(-1) / 127).clamp(min=1e-30).bfloat16()  # (V,), rounded before it is used
        rows = (table.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        rows = nn.functional.pad(rows, (0, -rows.shape[1] % WIDTHS))  # (V, E and zeros)
        self.rows, self.scale = (nn.Parameter(x, requires_grad=False) for x in (rows, scale))

    def forward(self, hidden: Tensor) -> Tensor:
        if short := self.rows.shape[1] - hidden.shape[1]:
            hidden = nn.functional.pad(hidden, (0, short))
        return torch._weight_int8pack_mm(hidden.bfloat16(), self.rows, self.scale).float() + self.bias

    def bytes_read(self, rows: int) -> int:
        return self.rows.nbytes + self.scale.nbytes


class Screen(Vocabulary):
    """Exact logits for about `words` of the best words of each row; the others keep those of a low-rank factor of the table.

    The words come in groups of NEIGHBOURS, the groups with the best words: to choose among an eighth as many takes a third of
    the time, and their rows of the table lie together.

    table ~ left (V, R) @ right (R, E), from the table's singular value decomposition: no training. The factor's logits
    rank the words, and stand in for those of the tail: cutting the tail off instead would take away two to three times as
    much of the distribution as the factor's errors do (docs/benchmarks.md).
    """

    def __init__(self, table: Tensor, never: Tensor, words: int, rank: int) -> None:
        vocab, width = table.shape
        if words < 1 or not 1 <= rank <= width:
            raise UserError(f"the screen: expected words >= 1 and 1 <= rank <= {width}, got {words} words of rank {rank}")
        left, right = low_rank(table, rank)
        if short := -vocab % NEIGHBOURS:  # rows that fill the last group; nobody can draw them
            left, table = (nn.functional.pad(x, (0, 0, 0, short)) for x in (left, table))
            never = nn.functional.pad(never, (0, short), value=True)
        super().__init__(table, never)
        self.words, self.size, self.groups = words, vocab, min(-(-words // NEIGHBOURS), len(table) // NEIGHBOURS)
        self.left, self.right = (nn.Parameter(x.to(table.dtype), requires_grad=False) for x in (left, right))

    def forward(self, hidden: Tensor) -> Tensor:
        linear = nn.functional.linear
        scores = linear(linear(hidden, self.right), self.left).float() + self.bias  # (B, V)
        groups, best = self._grouped(scores, 1), self.choose(scores)  # (B, V / 8, 8), (B, n)
        rows, bias = self._grouped(self.table, 0)[best], self._grouped(self.bias, 0)[best]  # (B, n, 8, E), (B, n, 8)
        exact = (rows.float() * hidden[:, None, None].float()).sum(-1) + bias
        return groups.scatter(1, best[..., None].expand_as(exact), exact).flatten(1)[:, : self.size]

    def choose(self, scores: Tensor) -> Tensor:
        """The groups that get exact logits: scores (B, V) -> (B, n)."""
        return self._grouped(scores, 1).amax(-1).topk(self.groups, sorted=False).indices

    @staticmethod
    def _grouped(x: Tensor, dim: int) -> Tensor:
        return x.unflatten(dim, (-1, NEIGHBOURS))

    def bytes_read(self, rows: int) -> int:
        candidates = self.groups * NEIGHBOURS * self.table.shape[1] * self.table.element_size()
        return self.left.nbytes + self.right.nbytes + min(self.table.nbytes, rows * candidates)

    def flops(self) -> float:
        return 2.0 * (self.left.numel() + self.right.numel() + self.groups * NEIGHBOURS * self.table.shape[1])


def make_vocabulary(table: Tensor, never: Tensor, words: int = 0, rank: int = 64, int8: bool = False) -> Vocabulary:
    """The exact product, or with `words` the screen, or with `int8` the table in 8 bits."""
    if words and int8:
        raise UserError(f"expected a screen or int8, got both ({words} words); leave one out")
    if int8:
        return Int8(table, never)
    return Screen(table, never, words, rank) if words else Vocabulary(table, never)


def low_rank(table: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a table (V, E) in the least-squares sense: (V, R) and (R, E), float32.

    From the eigenvectors of the E x E matrix table^T table: far smaller than the table.
    """
    table = table.float()
    _, vectors = torch.linalg.eigh((table.T @ table).double())  # ascending
    right = vectors[:, -rank:].T.float().contiguous()  # (R, E)
    return table @ right.T, right
