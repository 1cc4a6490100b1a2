"""DoRA's column scale: the kernels and their plain twins agree, at odd sizes and in every dtype."""

import pytest
import torch

from deltaw.ops.columns import scale, scale_backward, scale_backward_reference, scale_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (3, 17), (64, 32), (65, 48), (200, 33)])
def test_kernels_equal_their_plain_twins(rows, columns, dtype):
    torch.manual_seed(0)
    y, dy = torch.randn(2, rows, columns).to(dtype)
    c = torch.rand(columns, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(scale(y.clone(), c), scale_reference(y.clone(), c), **tolerance)
    (g, sums), (g_plain, sums_plain) = scale_backward(dy, y, c), scale_backward_reference(dy, y, c)
    torch.testing.assert_close(g, g_plain, **tolerance)
    assert sums.dtype == sums_plain.dtype
    torch.testing.assert_close(sums, sums_plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(rows, 1) ** 0.5)


def test_sums_do_not_depend_on_the_number_of_threads():
    y, dy, c = torch.randn(300, 40), torch.randn(300, 40), torch.rand(40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(scale_backward(dy, y, c)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)
