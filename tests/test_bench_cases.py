"""The cases of bench.py: how positions lie in a record, and the peers' formulas by loops."""

from types import SimpleNamespace

import pytest
import torch

from crystal import bench_cases
from crystal.runtime.config import UserError


def test_positions_are_laid_out_as_a_record():
    """Three latents, then four rows of an answer at the end of ten; a case's labels all count; supervised
    pairs are half of the sequences.
    """
    a = SimpleNamespace(dtype="float32", compile=False, rows=5, vocab=11)
    sizes = [4, 10, 4, 3, 6, 2, 8]
    leaves, rows, cols = bench_cases.heads(a, sizes, torch.device("cpu"))
    assert (
        rows.tolist() == [[6, 7, 8, 9]] * 4
        and cols.tolist() == [[3, 4, 5]] * 4
        and [tuple(x.shape) for x in leaves] == [(4, 6, 10, 8), (4, 2, 10, 8)]
    )
    _, again, _ = bench_cases.heads(a, [1, 4, 9, 2, 2, 2, 8], torch.device("cpu"))
    assert again.tolist() == [[0, 1, 2, 3]]  # no more rows than there are positions

    # Eq. 5 in its default kind by loops over pairs, heads and rows: the intact path's share
    # against the corrupted one's.
    _, leaves, peers, _ = bench_cases.align_case(a, sizes, torch.device("cpu"))
    q, k = leaves[0].detach(), leaves[1].detach()
    means = []
    for pair in range(2):
        terms = []
        for head in range(6):
            for row in range(6, 10):
                p, r = (
                    ((q[path, head, row] @ k[path, head // 3, 3:6].T) * 8**-0.5).softmax(-1)
                    for path in (pair, pair + 2)
                )
                terms.append(float((p * (p.log() - r.log())).sum()))
        means.append(sum(terms) / len(terms))
    assert peers["eager"](*leaves)[0].tolist() == pytest.approx(means, rel=1e-4)

    _, (z, z2), peers, _ = bench_cases.vocab_case(a, sizes, torch.device("cpu"))
    ce, ce2, kl = peers["eager"](z, z2)
    p, r = z.detach().softmax(-1), z2.detach().softmax(-1)
    assert kl.tolist() == pytest.approx(
        (p * (p.log() - r.log())).sum(-1).tolist(), rel=1e-4
    ) and ce.shape == ce2.shape == (5,)
    assert all(any(abs(float(c) + float(v.log())) < 1e-4 for v in row) for c, row in zip(ce.detach(), p))
    with pytest.raises(UserError, match="B must be even"):
        bench_cases.frobenius_case(a, [3, *sizes[1:]], torch.device("cpu"))
