"""The meta gradients the long way, through the step itself: what those of the scripts are checked against."""

import torch
import torch.nn.functional as F
from torch.func import functional_call


def through_step(module, loss, dev_loss, lr, of, momentum=0.0, wd=0.0, buffers=None):
    """Gradient of dev_loss, one SGD step ahead along the gradient of `loss`, by the tensor `of`.

    loss and dev_loss take forward(inputs) to a scalar; momentum, with its buffers, and decay enter the step
    as in torch's SGD.
    """

    def forward(parameters):
        copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return lambda inputs: functional_call(module, {**parameters, **copies}, inputs)

    theta = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    gradients = torch.autograd.grad(loss(forward(theta)), list(theta.values()), create_graph=True)
    ahead = {}
    for i, ((name, p), gradient) in enumerate(zip(theta.items(), gradients, strict=True)):
        step = gradient + wd * p
        ahead[name] = p - lr * (step if buffers is None else step + momentum * buffers[i])
    return torch.autograd.grad(dev_loss(forward(ahead)), of)[0]


def weight_gradients(module, batch, dev_batch, weights, lr, loss=None, dev_loss=None):
    """d L_dev / d w_i [B] for inner loss sum_i w_i l_i at w = weights [B]."""
    cross_entropy = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    loss, dev_loss = loss or cross_entropy, dev_loss or cross_entropy
    w = weights.clone().requires_grad_()
    return through_step(
        module,
        lambda forward: (w * loss(forward(batch[0]), batch[1])).sum(),
        lambda forward: dev_loss(forward(dev_batch[0]), dev_batch[1]).mean(),
        lr,
        w,
    )
