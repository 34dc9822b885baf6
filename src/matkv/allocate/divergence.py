"""How far a model on truncated latents is from itself with a full cache.

    KL = mean over tokens of KL(teacher ‖ student),  teacher: full cache, student: gated

The text is cut into batches, and under accelerate or torchrun every process measures every n-th
batch. What is reduced is one number a sequence, added up in one order everywhere, so that any
number of processes gives the same result to the last bit.

Shapes: B batch, N sequence, T token, V vocabulary, G KV head, D head dim, C candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from matkv.allocate.replay import blocks_of, recorded, resumed
from matkv.bases.gates import GatedProjection
from matkv.data.batch import Batch, Tokens
from matkv.errors import DataError
from matkv.hf.memory import check_fits
from matkv.logits import row_blocks
from matkv.ranks import SIDES, RankTable

Gated = dict[int, GatedProjection]


@dataclass
class Piece:
    """One batch of the text: `first` is the index of its first sequence in the whole text.

    `teacher_BTV` holds the teacher's logits, in the model's own dtype, where the piece belongs to
    this process.
    """

    first: int
    batch: Batch
    teacher_BTV: Tensor | None = None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.batch.ids_BT))


@dataclass(frozen=True)
class Text:
    """Tokenized text in batches, of which this process measures `mine`."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Text:
        pieces: list[Piece] = []
        for batch in batches:
            pieces.append(Piece(pieces[-1].rows.stop if pieces else 0, batch))
        return cls(tuple(pieces))

    @property
    def sequences(self) -> int:
        return sum(len(piece.batch.ids_BT) for piece in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(piece.batch.tokens for piece in self.pieces)

    @property
    def mine(self) -> tuple[Piece, ...]:
        if not _distributed():
            return self.pieces
        return self.pieces[dist.get_rank() :: dist.get_world_size()]

    def forget_teacher(self) -> None:
        """Free the teacher's logits."""
        for piece in self.pieces:
            piece.teacher_BTV = None


@dataclass(frozen=True)
class Divergence:
    """Nats a token: `kl` from the teacher, and the student's and teacher's own loss on the text."""

    kl: float
    loss: float
    teacher_loss: float

    def weighted(self, kl: float, ce: float) -> float:
        """The loss that training minimizes, over the teacher's."""
        return kl * self.kl + ce * (self.loss - self.teacher_loss)

    @property
    def perplexity_increase(self) -> float:
        """Student's perplexity over teacher's, minus one."""
        return float(torch.tensor(self.loss - self.teacher_loss, dtype=torch.float64).expm1())


def take_text(batches: Iterable[Tokens], tokens: int, model: PreTrainedModel, use: str) -> Text:
    """As many batches as hold `tokens` tokens.

    Raises:
        DataError: they hold fewer; `use` names what the text is for.
        MatkvError: their logits are more than the device's memory holds.
    """
    check_fits(
        tokens * logits_nbytes(model), model.device, f"a text of {tokens} tokens to {use} on"
    )
    taken: list[Batch] = []
    count = 0
    for given in batches:
        taken.append(Batch.of(given).to(model.device))
        count += taken[-1].tokens
        if count >= tokens:
            return Text.of(taken)
    raise DataError(f"the text ends after {count} of {tokens} tokens to {use} on: give more text")


def logits_nbytes(model: PreTrainedModel) -> int:
    """Bytes of one token's logits."""
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return vocabulary * model.dtype.itemsize


@torch.inference_mode()
def add_teacher(model: PreTrainedModel, text: Text) -> None:
    """Keep the teacher's logits with the pieces of this process, unless they are there."""
    for piece in text.mine:
        if piece.teacher_BTV is not None:
            continue
        piece.teacher_BTV = model(**piece.batch.inputs(), use_cache=False).logits


@torch.inference_mode()
def measure(model: PreTrainedModel, gated: Gated, text: Text, table: RankTable) -> Divergence:
    """Divergence of the model at `table`, by all processes together."""
    set_gates(gated, table)
    sums_N3 = torch.zeros(text.sequences, 3, dtype=torch.float64, device=model.device)
    for piece in text.mine:
        logits_BTV = model(**piece.batch.inputs(), use_cache=False).logits
        sums_N3[piece.rows] = _sums(logits_BTV, piece)
    kl, loss, teacher_loss = (reduced(sums_N3).sum(0)).tolist()
    targets = sum(int(_target_mask(piece.batch.real).sum()) for piece in text.pieces)
    return Divergence(kl / text.tokens, loss / targets, teacher_loss / targets)


@torch.inference_mode()
def measure_changes(
    model: PreTrainedModel,
    gated: Gated,
    text: Text,
    table: RankTable,
    changes: Mapping[int, Sequence[RankTable]],
    *,
    batched: int = 1,
) -> tuple[float, dict[int, list[float]]]:
    """KL of `table`, and of tables that differ from it in one layer: `changes[layer]` lists them.

    Hidden states below that layer are computed once for all of its tables, and `batched` tables go
    through the model together.
    """
    order = sorted(changes)
    columns = 1 + sum(len(changes[layer]) for layer in order)
    kl_NC = torch.zeros(text.sequences, columns, dtype=torch.float64, device=model.device)
    blocks = blocks_of(model)
    for piece in text.mine:
        set_gates(gated, table)
        with recorded(blocks) as outputs:
            logits_BTV = model(**piece.batch.inputs(), use_cache=False).logits
        kl_BC = [_sums(logits_BTV, piece)[:, 0]]
        for layer in order:
            for first in range(0, len(changes[layer]), batched):
                tables = changes[layer][first : first + batched]
                _open_batched(gated[layer], layer, tables, len(piece.batch.ids_BT))
                with resumed(blocks, outputs, layer, len(tables)):
                    inputs = piece.batch.inputs(len(tables))
                    logits = model(**inputs, use_cache=False).logits.split(len(piece.batch.ids_BT))
                kl_BC += [_sums(logits_BTV, piece)[:, 0] for logits_BTV in logits]
            set_gates({layer: gated[layer]}, table)
        kl_NC[piece.rows] = torch.stack(kl_BC, dim=1)
    kl, *changed = (reduced(kl_NC).sum(0) / text.tokens).tolist()
    by_table = iter(changed)
    return kl, {layer: [next(by_table) for _ in changes[layer]] for layer in order}


def set_gates(gated: Gated, table: RankTable) -> None:
    """Keep the columns that `table` keeps, as it keeps them."""
    for layer, projection in gated.items():
        for side in SIDES:
            if table.is_coded(layer):
                projection.code(side, table.bands(layer, side))
            else:
                projection.open(side, torch.tensor(table.side(side)[layer]))


def _open_batched(
    projection: GatedProjection, layer: int, tables: Sequence[RankTable], sequences: int
) -> None:
    """Open what each of several tables keeps in a layer, for so many sequences a table."""
    for side in SIDES:
        ranks_CG = torch.tensor([table.side(side)[layer] for table in tables])
        projection.open(side, ranks_CG.repeat_interleave(sequences, 0))


def reduced(rows_N: Tensor) -> Tensor:
    """Rows of all processes: each fills its own and leaves the others at zero.  [N... -> N...]"""
    if _distributed():
        dist.all_reduce(rows_N)
    return rows_N


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- sums over one batch


def _sums(logits_BTV: Tensor, piece: Piece) -> Tensor:
    """KL, student's loss and teacher's loss of every sequence, summed over its tokens.  [B3]

    A block of positions at a time: fp32 copies of all logits would be the largest tensors here.
    """
    assert piece.teacher_BTV is not None
    sums = []
    for student_TV, teacher_TV, ids_T, mask_T in zip(
        logits_BTV, piece.teacher_BTV, piece.batch.ids_BT, piece.batch.real, strict=True
    ):
        target_T = F.pad(ids_T[1:], (0, 1))
        wanted_T = F.pad(_target_mask(mask_T), (0, 1))
        kl, loss, teacher_loss = torch.zeros(3, dtype=torch.float64, device=ids_T.device)
        for rows in row_blocks(student_TV):
            log_q_RV = student_TV[rows].float().log_softmax(-1)
            log_p_RV = teacher_TV[rows].float().log_softmax(-1)
            kl_RV = F.kl_div(log_q_RV, log_p_RV, reduction="none", log_target=True)
            kl += (kl_RV.sum(-1).double() * mask_T[rows]).sum()
            for log_RV, total in ((log_q_RV, loss), (log_p_RV, teacher_loss)):
                log_R = log_RV.gather(-1, target_T[rows, None])[:, 0]
                total -= (log_R.double() * wanted_T[rows]).sum()
        sums.append(torch.stack([kl, loss, teacher_loss]))
    return torch.stack(sums)


def _target_mask(mask_BT: Tensor) -> Tensor:
    """1 at tokens whose next token is there to be predicted.  [..., T-1]"""
    return mask_BT[..., 1:] * mask_BT[..., :-1]
