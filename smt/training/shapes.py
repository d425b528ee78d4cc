"""Batches of one shape for all steps, which a device has compiled or chosen for once."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from smt.data.walk import Batch
from smt_kernels.linear_cross_entropy import IGNORE_INDEX


def full_shape(batch: Batch, length: int) -> Batch:
    """The same steps in ``length`` columns and with all rows, so that every step has the shape of every other.

    Columns that are missing are padding. Rows that wait read padding alone, beside those that read: at the same step of a
    document, although of none. Nothing of them is counted, and nobody reads the states that they leave: where rows begin
    together, a batch is narrow when all its documents end, and rows that wait begin anew with the others.
    """
    missing = length - batch.input_ids.shape[1]
    reading = batch.reading
    if not missing and reading.all():
        return batch
    begins = batch.reset[reading].all()  # also where no row reads
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, missing)),
        targets=F.pad(batch.targets, (0, missing), value=IGNORE_INDEX),
        valid=F.pad(batch.valid, (0, missing), value=False),
        reset=torch.where(reading, batch.reset, begins),
        documents=batch.documents.clamp(min=0),
    )
