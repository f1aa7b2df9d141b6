"""The head and its loss: negative log likelihoods of targets, without ever holding all logits.

Logits are made a slice of rows at a time, as many as the device works on well. Weight gradients are added up in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.model import kernels, ops
from craton.model.gpu import train_kernels
from craton.model.plain import Pair

IGNORE = -100  # a target for which there is no loss
_SLICE_BYTES = {"cpu": 32 << 20}  # of fp32 logits held at once; what stays near the cores
_SLICE_BYTES_ELSEWHERE = 1 << 30


def token_nll(x: Tensor, w: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log likelihood in nats of each target, (rows,) fp32, with a gradient.

    x (rows, k): hidden states; w (vocabulary, k): the head; target (rows,) int64, IGNORE: 0 and no gradient. softcap
    bounds the logits by a tanh (arXiv 2408.00118). Backward makes the logits again, slice by slice: where the weight of
    each row is known beforehand `weighted_nll` saves that product. ValueError for a target outside the vocabulary.
    """
    check_targets(target, w.shape[0])
    return _TokenNLL.apply(x, w, target, softcap)


def weighted_nll(x: Tensor, w: Tensor, target: Tensor, weight: Tensor, softcap: float | None = None) -> Pair:
    """The sum of weight (rows,) * nll, a scalar with a gradient, and nll (rows,) in nats without one.

    The rest as for `token_nll`. The gradient is made while the logits are at hand.
    """
    check_targets(target, w.shape[0])
    return _WeightedNLL.apply(x, w, target, weight, softcap)


def check_targets(target: Tensor, vocabulary: int) -> None:
    """ValueError unless every target is an id of the vocabulary or IGNORE. On a GPU the process ends instead, later."""
    good = ((target >= 0) & (target < vocabulary)) | (target == IGNORE)
    if target.device.type != "cpu":
        torch._assert_async(good.all(), "a target is outside the vocabulary")
    elif not good.all():
        bad = int(target[~good][0])
        raise ValueError(f"target {bad} is outside the vocabulary of {vocabulary}; {IGNORE} leaves a position out")


def _compute_type(x: Tensor) -> torch.dtype:
    """The type of products: autocast's inside of it, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _slices(x: Tensor, vocabulary: int) -> list[slice]:
    rows = max(1, _SLICE_BYTES.get(x.device.type, _SLICE_BYTES_ELSEWHERE) // (4 * vocabulary))
    return [slice(at, at + rows) for at in range(0, x.shape[0], rows)]


def _loss_and_gradient(products: Tensor, target: Tensor, weight: Tensor, softcap: float | None) -> Pair:
    """Products (rows, vocabulary), not yet capped -> weight times the gradient of the nll by them, in their place where
    that is possible, and nll (rows,) fp32."""
    if products.device.type == "cuda" and train_kernels is not None:
        return products, train_kernels.cross_entropy(products, target, weight, softcap)
    logits = _capped(products.float(), softcap)
    gradient, nll = _softmax_gradient(logits if softcap is None else logits.clone(), target, weight)
    return gradient if softcap is None else gradient * (1 - (logits / softcap).square()), nll


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """In their place."""
    return logits if softcap is None else torch.tanh_(logits.div_(softcap)).mul_(softcap)


def _softmax_gradient(logits: Tensor, target: Tensor, weight: Tensor) -> Pair:
    """fp32 logits (rows, vocabulary) -> weight * (softmax - onehot(target)), in their place, and nll (rows,)."""
    library = kernels.training_kernels() if logits.device.type == "cpu" else None
    if library is not None:
        logits, target, weight = logits.contiguous(), target.contiguous(), weight.float().contiguous()
        nll = logits.new_empty(logits.shape[0])
        places = (t.data_ptr() for t in (logits, target, weight, nll))
        library.cross_entropy(*places, *logits.shape)
        return logits, nll
    log_p = torch.log_softmax(logits, -1)
    nll = F.nll_loss(log_p, target, reduction="none", ignore_index=IGNORE)
    counted = (target != IGNORE).to(log_p.dtype)
    gradient = log_p.exp_()
    gradient.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(gradient[:, :1]))
    return gradient.mul_((weight * counted)[:, None]), nll


class _Sliced:
    """Products of slices of x with w, and their gradients gathered."""

    def __init__(self, x: Tensor, w: Tensor, dtype: torch.dtype):
        self.x, self.w = x.to(dtype), w.to(dtype)
        self.cpu = x.device.type == "cpu"
        self.dw: Tensor | None = None

    def products(self, part: slice) -> Tensor:
        """(rows, vocabulary), not yet capped."""
        return ops.matmul_t(self.x[part], self.w)

    def gradients(self, gradient: Tensor, part: slice, dx: Tensor | None, want_w: bool) -> None:
        """Adds what the gradient (rows, vocabulary) of a slice's products gives to dx[part] and dw."""
        gradient = gradient.to(self.x.dtype)
        if dx is not None:
            dx[part] = ops.matmul_t(gradient, self.w.t())
        if want_w:
            piece = self._weight_gradient(gradient, self.x[part])
            self.dw = piece if self.dw is None else self.dw.add_(piece)

    def _weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """(vocabulary, k) fp32: summed in fp32 within the product too, where the device can."""
        if self.cpu:
            return ops.weight_gradient(gradient, x).float()
        if gradient.dtype == torch.float32:
            return gradient.t() @ x
        return torch.mm(gradient.t(), x, out_dtype=torch.float32)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, weight: Tensor, softcap: float | None) -> Pair:
        sliced = _Sliced(x, w, _compute_type(x))
        want_x, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dx = torch.empty_like(x) if want_x else None
        nll = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for part in _slices(x, w.shape[0]):
            gradient, nll[part] = _loss_and_gradient(sliced.products(part), target[part], weight[part], softcap)
            if want_x or want_w:
                sliced.gradients(gradient, part, dx, want_w)
        ctx.save_for_backward(dx, None if sliced.dw is None else sliced.dw.to(w.dtype))
        ctx.mark_non_differentiable(nll)
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * scale, None if dw is None else dw * scale, None, None, None


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        ctx.softcap, ctx.dtype = softcap, _compute_type(x)
        sliced = _Sliced(x, w, ctx.dtype)
        nll = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for part in _slices(x, w.shape[0]):
            logits = _capped(sliced.products(part).float(), softcap)
            at_target = logits.gather(1, target[part].clamp(min=0)[:, None])[:, 0]
            nll[part] = (logits.logsumexp(-1) - at_target).masked_fill_(target[part] == IGNORE, 0.0)
        ctx.save_for_backward(x, w, target)
        return nll

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
        x, w, target = ctx.saved_tensors
        sliced = _Sliced(x, w, ctx.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for part in _slices(x, w.shape[0]):
            gradient, _ = _loss_and_gradient(sliced.products(part), target[part], dnll[part], ctx.softcap)
            sliced.gradients(gradient, part, dx, ctx.needs_input_grad[1])
        return dx, None if sliced.dw is None else sliced.dw.to(w.dtype), None, None
