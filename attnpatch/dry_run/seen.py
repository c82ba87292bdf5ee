"""What one attention site did in a rehearsal."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Seen:
    """What one attention site did in a rehearsal.

    Attributes:
        calls: Number of calls.
        temporaries: The most bytes that a call held beside its inputs, its output and a cache.
        fused: Name of the fused kernel that ran, or None.
        outside: Name of the kernel outside torch that would run, or None.
        is_dense: Whether SDPA ran its dense math.
        is_product: Whether matrices were multiplied.
        most_rows: An upper bound on the query rows of a call.
        asked_rows: The most query rows of a call for which the policy was asked.
        reason: The policy's reason for its decision; None if the policy was not asked.
        step: Query rows and heads per step, if the site ran by rows.
    """

    calls: int = 0
    temporaries: int = 0
    fused: str | None = None
    outside: str | None = None
    is_dense: bool = False
    is_product: bool = False
    most_rows: int = 0
    asked_rows: int = 0
    reason: str | None = None
    step: tuple[int, int] | None = None

    @property
    def kernel(self) -> str:
        """What computed the call, in words."""
        if self.outside is not None:
            return f"outside torch: {self.outside}"
        if self.fused is not None:
            return f"fused: {self.fused}"
        return "dense math" if self.is_dense else "hand-written" if self.is_product else "unknown"
