"""What gsplat's `rasterization` computes, in plain torch: for machines without CUDA, and small scenes."""

from typing import Any

import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci, _spherical_harmonics
from torch import Tensor


def _colors(means: Tensor, colors: Tensor, viewmats: Tensor, sh_degree: int | None) -> Tensor:
    if sh_degree is None:
        return colors
    position = viewmats.inverse()[0, :3, 3]
    return (_spherical_harmonics(sh_degree, means - position, colors) + 0.5).clamp(min=0)


def rasterization(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    render_mode: str,
    sh_degree: int | None,
    rasterize_mode: str,
    **_: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One camera; gsplat's own projection and harmonics, then every Gaussian in every pixel, front to back.

    Unlike gsplat it does not stop at opaque pixels (transmittance under 1e-4), and `absgrad` is the absolute value of
    the gradients' sum.
    """
    covariances, _ = _quat_scale_to_covar_preci(quats, scales, True, False)
    radii, means2d, depths, conics, compensations = _fully_fused_projection(
        means, covariances, viewmats, Ks, width, height, 0.3, near_plane, far_plane, rasterize_mode == "antialiased"
    )
    if means2d.requires_grad:
        means2d.register_hook(lambda gradient: setattr(means2d, "absgrad", gradient.abs()))
    if compensations is not None:
        opacities = opacities * compensations[0]
    values = torch.cat([_colors(means, colors, viewmats, sh_degree), depths[0, :, None]], dim=1)

    order = depths[0].argsort()
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).view(-1, 1, 2).to(means) + 0.5
    dx, dy = (pixels - means2d[0, order]).unbind(-1)  # (pixels, Gaussians)
    a, b, c = conics[0, order].unbind(-1)
    alphas = opacities[order] * torch.exp(-(0.5 * (a * dx.square() + c * dy.square()) + b * dx * dy))
    alphas = alphas.clamp(max=0.999)
    alphas = alphas.where((alphas >= 1 / 255) & (radii[0, order] > 0), 0.0)
    behind = torch.cumprod(1 - alphas, dim=1)
    weights = alphas * torch.cat([torch.ones_like(behind[:, :1]), behind[:, :-1]], dim=1)

    total = weights.sum(1, keepdim=True)
    rendered = weights @ values[order]
    mean_depth = rendered[:, 3:] / total.clamp(min=1e-10)
    image = torch.cat([rendered[:, :3], mean_depth], dim=1) if render_mode == "RGB+ED" else rendered[:, :3]
    info = {
        "means2d": means2d,
        "radii": radii,
        "width": width,
        "height": height,
        "n_cameras": 1,
        "gaussian_ids": None,
    }
    return image.view(1, height, width, -1), total.view(1, height, width, 1), info
