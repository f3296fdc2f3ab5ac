"""An output layer divided among processes equals the whole one: log-probs, entropies, losses and all gradients."""

import math
import os
import socket

import naive
import pytest
import tokcredit as tc
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokcredit.blocks.shard import Shard

V, D = 13, 5


def test_without_processes():
    with pytest.raises(RuntimeError, match=r"group: expected torch.distributed to be initialized"):
        Shard((5, 8))
    with pytest.raises(TypeError, match=r"shard: expected tokcredit.Shard, got tuple"):
        tc.head.log_probs_and_entropies(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), shard=(3,))


def layer(dtype=torch.float64, n=11, v=V):
    """The same on every process."""
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((n, D), (v, D), (v,)))
    tokens = torch.randint(0, v, (n,), generator=g)
    tokens[::4] = -1
    return [x.to(dtype) for x in (hidden, weight, bias)], tokens


def part_of(shard, x):
    return x[shard.first : shard.first + shard.sizes[shard.rank]]


def gradients(leaves, tokens, loss, **settings):
    """Log-probs, entropies, further results and the gradients of a loss of all."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    hidden, weight, bias = leaves
    found = tc.head.log_probs_and_entropies(hidden, weight, tokens, bias, **settings)
    return [*found, *torch.autograd.grad(loss(*found), [x for x in leaves if x is not None])]


def weighted(log_probs, entropies, *further):
    at = torch.arange(len(log_probs), dtype=log_probs.dtype)
    loss = (log_probs * (at - 3)).sum() + (entropies * (at * 0.3 - 1)).sum()
    for x in further:  # squares, log-probs of chosen ids
        loss = loss + (x.reshape(len(x), -1).sum(1) * (2 - at)).sum()
    return loss


def compare(shard, leaves, tokens, loss=weighted, rtol=1e-9, **settings):
    """Compare this process's part with the whole layer."""
    expected = gradients(leaves, tokens, loss, **settings)
    own = [leaves[0], *(None if x is None else part_of(shard, x) for x in leaves[1:])]
    found = gradients(own, tokens, loss, shard=shard, **settings)
    assert len(found) == len(expected)
    whole = len(expected) - sum(x is not None for x in leaves[1:])
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        b = part_of(shard, b) if number >= whole else b
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.double().sub(b.double()).norm() <= rtol * b.double().norm() + 1e-12, (number, settings)
    return found


def two_passes(shard):
    leaves, tokens = layer()
    each = 0.5 + torch.arange(len(tokens), dtype=torch.float64) / 7
    for settings in (
        {},
        {"tile_bytes": 1},
        {"tile_bytes": 8 * 8 * 3, "temperature": 0.7},
        {"softcap": 2.0, "scale": 0.5, "temperature": each},
    ):
        compare(shard, leaves, tokens, **settings)
    compare(shard, [*leaves[:2], None], tokens)
    each_row = torch.stack([(tokens + k) % V for k in (1, 4)], 1)
    for chosen in (torch.tensor([12, 0, 6]), torch.where(each_row == 3, -1, each_row)):
        compare(shard, leaves, tokens, tile_bytes=8 * 8 * 3, squares=True, chosen=chosen, softcap=2.0)
    for loss in (lambda log_probs, _: log_probs[5], lambda _, entropies: entropies.sum()):
        compare(shard, leaves, tokens, loss)
    # Only the first, or no, process has ids of the vocabulary: the further rows are padding.
    for vocabulary in (9, 3):
        compare(shard, leaves, tokens.clamp(max=vocabulary - 1), vocabulary=vocabulary)


def lower_precision(shard):
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        leaves, tokens = layer(dtype, 60, V)
        compare(shard, leaves, tokens, rtol=rtol, tile_bytes=600)
    compare(shard, leaves, tokens, rtol=1e-2, logits_dtype=torch.float32)


def forbidden(shard):
    """All ids of the first shard have a bias of -inf, and then a single one."""
    leaves, tokens = layer()
    bias = leaves[2]
    last = max(shard.sizes[0], 1)
    for ids in (slice(0, last), slice(4, 5)):
        leaves[2] = bias.index_fill(0, torch.arange(V)[ids], -math.inf) if ids.stop < V else bias
        ids_left = (leaves[2] > -math.inf).nonzero()[:, 0]
        allowed = torch.where(tokens >= 0, ids_left[tokens % len(ids_left)], -1)
        for softcap in (None, 3.0):
            found = compare(shard, leaves, allowed, softcap=softcap)
            assert all(x.isfinite().all() for x in found)


def rows_without_a_token(shard):
    leaves, tokens = layer()
    found = compare(shard, leaves, torch.full_like(tokens, -1))
    assert all((x == 0).all() for x in found)
    rows = torch.arange(len(tokens))  # with those whose token is -1
    compare(shard, leaves, tokens, rows=rows)
    clean = compare(shard, leaves, tokens)
    leaves[0][tokens < 0] = math.nan
    own = [leaves[0], *(part_of(shard, x) for x in leaves[1:])]
    for a, b in zip(gradients(own, tokens, weighted, shard=shard), clean, strict=True):
        assert torch.equal(a, b)
    leaves[0][1] = math.nan
    own[0] = leaves[0]
    log_probs, entropies, of_hidden, of_weight, _ = gradients(own, tokens, weighted, shard=shard)
    assert log_probs.isnan().nonzero().tolist() == entropies.isnan().nonzero().tolist() == [[1]]
    assert of_hidden.isnan().any(1).nonzero().tolist() == [[1]] and of_weight.isnan().all()


def parts_of_the_gradient(shard):
    """Without the sum, the gradients of the hidden states add up to the whole."""
    leaves, tokens = layer()
    own = [leaves[0], *(part_of(shard, x) for x in leaves[1:])]
    part = gradients(own, tokens, weighted, shard=Shard(shard.sizes, sums_hidden=False))[2]
    dist.all_reduce(part)
    torch.testing.assert_close(part, gradients(leaves, tokens, weighted)[2])


def whole_losses(shard):
    """One pass and two passes of objectives, with terms, filters and rows without a token."""
    objectives = (tc.mix("dapo", terms=("kl(0.1)", "entropy(0.01)")), tc.methods.ctpo(), tc.methods.sft())
    for objective in objectives:
        batch = naive.with_inputs(naive.random_batch(3)[0], objective.required_inputs)
        prepared = objective.prepare(batch)
        assert objective.separable(prepared) == (objective != tc.methods.ctpo())
        hidden = torch.randn((*batch.shape, D), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        _, weight, bias = layer()[0]
        whole = [x.requires_grad_() for x in (hidden, weight, bias)]
        expected = objective.loss_from_hidden(prepared, *whole)
        expected_gradients = torch.autograd.grad(2 * expected.loss, whole)
        own = [x.detach().requires_grad_() for x in (hidden, part_of(shard, weight), part_of(shard, bias))]
        for tile_bytes in (None, 8 * 8 * 5):
            found = objective.loss_from_hidden(prepared, *own, shard=shard, tile_bytes=tile_bytes)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
            assert found.metrics.keys() == expected.metrics.keys()
            found_gradients = torch.autograd.grad(2 * found.loss, own)
            for number, (a, b) in enumerate(zip(found_gradients, expected_gradients, strict=True)):
                torch.testing.assert_close(a, part_of(shard, b) if number else b, rtol=1e-9, atol=1e-12)


def errors(shard):
    leaves, tokens = layer()
    own = [leaves[0], *(part_of(shard, x) for x in leaves[1:])]
    for vocabulary, token in ((V, V), (9, 9), (V, -100)):
        wrong = tokens.clamp(max=vocabulary - 1)
        wrong[1] = token
        text = f"tokens: expected -1 or an id below the vocabulary of {vocabulary}, got {token}"
        with pytest.raises(ValueError, match=text):
            gradients(own, wrong, weighted, shard=shard, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=f"vocabulary: expected 1 to {V}"):
        gradients(own, tokens, weighted, shard=shard, vocabulary=V + 1)
    with pytest.raises(ValueError, match="shard: expected 14 rows of the weight in process"):
        gradients([leaves[0], torch.zeros(14, D, dtype=torch.float64), None], tokens, weighted, shard=shard)
    with pytest.raises(ValueError, match="sizes: expected"):
        Shard((*shard.sizes, 1))
    objective = tc.methods.gkd()
    batch, _ = naive.random_batch(3)
    prepared, hidden = objective.prepare(batch), torch.zeros(*batch.shape, D, dtype=torch.float64)
    teacher = (hidden, tc.head.Head(torch.ones(V, D, dtype=torch.float64)))
    with pytest.raises(ValueError, match="shard: expected a whole weight for a divergence"):
        objective.loss_from_hidden(prepared, hidden, own[1], shard=shard, teacher=teacher)
    teacher = (hidden, tc.head.Head(own[1], shard=shard))
    with pytest.raises(ValueError, match="teacher: expected a whole weight for a divergence"):
        objective.loss_from_hidden(prepared, hidden, leaves[1], teacher=teacher)


def data_parallel():
    """Rows divided among processes, of which the second has none that trains: its gradients are zeros, and it waits."""
    rank = dist.get_rank()
    for objective in (tc.methods.dapo(), tc.methods.gspo()):
        batch = naive.with_inputs(naive.random_batch(3)[0], objective.required_inputs)
        mask = batch.shaped(batch.response_mask).clone()
        mask[4:8] = False
        prepared = objective.prepare(batch.with_mask(mask.reshape(-1)))
        hidden = torch.randn((*batch.shape, D), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        hidden[4:8] = math.nan
        _, weight, bias = (x.requires_grad_() for x in layer()[0])
        whole = objective.loss_from_hidden(prepared, hidden.requires_grad_(), weight, bias).loss
        expected = torch.autograd.grad(whole, (weight, bias))
        rows = list(range(4 * rank, 4 * rank + 4))
        part = objective.loss_from_hidden(prepared.select(rows), hidden[rows], weight, bias).loss
        part.backward()
        assert rank != 1 or (part == 0 and (weight.grad == 0).all())
        for x, truth in zip((weight, bias), expected, strict=True):
            dist.all_reduce(x.grad)
            torch.testing.assert_close(x.grad, truth)
            assert (truth != 0).any()


CHECKS = (
    two_passes,
    lower_precision,
    forbidden,
    rows_without_a_token,
    parts_of_the_gradient,
    whole_losses,
    errors,
)


def one_rank(rank, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=3)
    for sizes in ((4, 6, 3), (6, 0, 7)):
        shard = Shard.of(torch.zeros(sizes[rank], D))
        assert shard.sizes == sizes and shard.rank == rank
        for check in CHECKS:
            check(shard)
    data_parallel()
    groups = [dist.new_group([k]) for k in range(3)]
    alone = Shard.of(torch.zeros(V, D), groups[rank])  # ranks of different groups do not wait for each other
    two_passes(alone)
    with pytest.raises(ValueError, match="group: expected one with this process"):
        Shard((V,), groups[rank - 1])
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (port,), nprocs=3)
