"""The manifold that rotations are learned on."""

import geoopt
import torch
from torch import Tensor

STEPS = 6  # of Newton and Schulz at most


class Stiefel(geoopt.EuclideanStiefel):
    """Square orthogonal matrices X with the Euclidean metric; the tangent vector X A is given by its skew generator A.

    Generators need no transport: the one of X is carried to Y as that of Y, an isometry. Retraction is the polar one,
    `Y (Y^T Y)^{-1/2}` with `Y = X (I + A)`, by Newton-Schulz steps `Y <- Y - Y E / 2`, `E = Y^T Y - I`, that leave
    `3/4 E^2`: one or two for the usual step. Against geoopt's own QR it is ten times nearer to the geodesic, mends
    drift instead of adding it up, and a step is four batched products in all.
    """

    name = "Stiefel(euclidean, polar)"

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        return self.proju(x, x.mT @ u)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return (u - u.mT) / 2

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.retr(x, u), v

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        y = x + x @ u
        for _ in range(STEPS):
            error = y.mT @ y
            error.diagonal(dim1=-2, dim2=-1).sub_(1)
            y = y.sub(y @ error, alpha=0.5)
            if 0.75 * float(torch.linalg.matrix_norm(error).max()) ** 2 < 4 * torch.finfo(y.dtype).eps:
                break
        return y
