import torch

from cospadi.solvers.rotation import principal_axes


def signal(tokens=200, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, d, dtype=torch.float64, generator=generator) @ mixing


def test_truncation_loses_exactly_the_other_eigenvalues():
    x = signal()
    axes, energies = principal_axes(x.T @ x)
    torch.testing.assert_close(axes.T @ axes, torch.eye(12, dtype=torch.float64))
    for k in range(13):
        q = axes[:, :k]
        lost = (x - x @ q @ q.T).square().sum()
        torch.testing.assert_close(lost, energies[k:].sum(), rtol=1e-9, atol=1e-7)
    assert bool((energies.diff() <= 0).all())


def test_no_other_basis_loses_less():
    x = signal(seed=1)
    _, energies = principal_axes(x.T @ x)
    for seed in range(20):
        draw = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        other, _ = torch.linalg.qr(draw)
        assert (x - x @ other @ other.T).square().sum() >= energies[5:].sum()


def test_damping_changes_no_axis():
    x = signal(seed=2)
    moment = x.T @ x
    axes, energies = principal_axes(moment)
    damping = 0.01 * moment.diagonal().mean()
    damped, raised = principal_axes(moment + damping * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(damped, axes, rtol=0, atol=1e-8)
    torch.testing.assert_close(raised, energies + damping)


def test_signs_do_not_depend_on_the_solver():
    axes, _ = principal_axes(signal(seed=3).T @ signal(seed=3))
    assert bool((axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all())


def test_float32_and_rank_deficient_moments():
    x = signal(tokens=4, seed=4).float()
    axes, energies = principal_axes(x.T @ x)
    assert axes.dtype == energies.dtype == torch.float64
    assert bool((energies >= 0).all()) and energies[4:].sum() < 1e-5 * energies.sum()
    torch.testing.assert_close(axes.T @ axes, torch.eye(12, dtype=torch.float64))
