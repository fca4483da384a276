"""The integrator behind exact paths: order 8, and every point takes steps of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]  # (points, times, row numbers) -> derivative


def integrate(
    slope: Slope, x: Tensor, start: Tensor, end: Tensor, tolerance: float = 1e-10
) -> Tensor:
    """Solve dx/dt = slope from `start` to `end`, every row with times and steps of its own.

    Rows that are done leave the batch, so a few hard points do not slow the easy ones.

    Args:
        slope: dx/dt, given points `(b, d)`, times `(b,)` and the numbers of their rows.
        x: Where the rows start, `(b, d)`, float64.
        start: Their first times, `(b,)`.
        end: Their last times, `(b,)`, before or after the first.
        tolerance: Of the error of one step, relative and (a hundredth of it) absolute.

    Raises:
        ValueError: If a point, a time or a derivative is not finite: such a path would be followed
            for ever.

    Source: Hairer, Nørsett and Wanner (1993), DOP853, with scipy's coefficients.
    """
    from scipy.integrate import DOP853  # its tableau; scipy's own loop steps all rows together

    if not all(bool(torch.isfinite(t).all()) for t in (x, start, end)):
        raise ValueError("points and noise levels must be finite")
    stages = len(DOP853.B)
    a, b, e3, e5 = (torch.as_tensor(t).to(x) for t in (DOP853.A, DOP853.B, DOP853.E3, DOP853.E5))
    c = [float(node) for node in DOP853.C]
    x, time = x.clone(), start.clone()
    step = (end - start).clamp(-0.1, 0.1)
    rows = (step != 0).nonzero()[:, 0]
    first = slope(x[rows], time[rows], rows) if len(rows) else x[rows]
    while len(rows):
        here, now, ahead = x[rows], time[rows], end[rows] - time[rows]
        h = torch.where(step[rows].abs() < ahead.abs(), step[rows], ahead)
        k = x.new_empty(stages + 1, *here.shape)
        k[0] = first
        for s in range(1, stages):
            moved = torch.tensordot(a[s, :s], k[:s], 1)
            k[s] = slope(here + h[:, None] * moved, now + c[s] * h, rows)
        there = here + h[:, None] * torch.tensordot(b, k[:stages], 1)
        k[stages] = slope(there, now + h, rows)

        scale = tolerance * (0.01 + torch.maximum(here.abs(), there.abs()))
        fifth, third = ((torch.tensordot(e, k, 1) / scale).square().sum(1) for e in (e5, e3))
        error = h.abs() * fifth / ((fifth + 0.01 * third) * here.shape[1]).sqrt().clamp(min=1e-300)
        if not bool(torch.isfinite(error).all()):
            raise ValueError("the derivative is not finite: is something NaN or infinite in it?")
        good = error < 1
        x[rows] = torch.where(good[:, None], there, here)
        time[rows] = torch.where(good, now + h, now)
        step[rows] = h * (0.9 * error.clamp(min=1e-12) ** (-1 / 8)).clamp(0.2, 6.0)
        first = torch.where(good[:, None], k[stages], k[0])

        going = ~(good & (h == ahead))
        rows, first = rows[going], first[going]
    return x
