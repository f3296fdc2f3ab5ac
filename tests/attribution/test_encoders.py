"""GlobEnc and DecompX: golden vectors, the formulas as loops over pairs of tokens, and what they add up to."""

import pytest
import tokcredit as tc
import torch
import toy
from tokcredit.attribution import encoder
from tokcredit.attribution.globenc import rollout

IDS = torch.tensor([[0, 7, 9, 11, 2]])


def test_golden_vectors():
    model, ids = toy.golden(), torch.tensor([[1, 2, 3]])
    (_, x), *_ = encoder.embedded(model, ids, None)
    row = rollout(encoder.layers(model), x)[0]
    expected = torch.tensor([1, 0.0756141588, 0.1290977366], dtype=torch.float64)
    torch.testing.assert_close(row / row.max(), expected, rtol=0, atol=1e-9)
    score = tc.attribution.globenc(model, ids)
    torch.testing.assert_close(score[0], expected.new_tensor([1, 0, 0.0578584995]), rtol=0, atol=1e-9)
    found = tc.attribution.decompx(model, ids)
    golden = [
        [-0.3567680673, 0.2181792632],
        [-0.0125594428, 0.0079900113],
        [-0.0246263284, 0.0155957398],
    ]
    torch.testing.assert_close(found[0], torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-9)


def parameters(model):
    """Weights of each layer as the formulas name them."""
    base = getattr(model, model.base_model_prefix)
    for layer in base.encoder.layer:
        own, out, norm1, norm2 = (
            layer.attention.self,
            layer.attention.output.dense,
            layer.attention.output.LayerNorm,
            layer.output.LayerNorm,
        )
        yield own, out, norm1, layer.intermediate.dense, layer.output.dense, norm2


def attention_of(own, x, heads=2):
    size = x.shape[1] // heads
    out = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        q = x @ own.query.weight[part].T + own.query.bias[part]
        k = x @ own.key.weight[part].T + own.key.bias[part]
        out.append((q @ k.T / size**0.5).softmax(-1))
    return out


def by_head(own, out, h, heads=2):
    size = out.weight.shape[0] // heads
    part = slice(h * size, (h + 1) * size)
    return own.value.weight[part].T, own.value.bias[part], out.weight[:, part].T


def gelu(x):
    return torch.nn.functional.gelu(x)


def linear_norm(e, norm, x):
    return (e - e.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight


@torch.no_grad()
def naive_globenc(model, x):
    n, product = len(x), None
    for own, out, norm1, up, down, norm2 in parameters(model):
        attention = attention_of(own, x)
        e = [[x[i] * (i == j) for j in range(n)] for i in range(n)]
        for i in range(n):
            for j in range(n):
                for h in range(2):
                    wv, bv, wo = by_head(own, out, h)
                    e[i][j] = e[i][j] + attention[h][i, j] * ((x[j] @ wv + bv) @ wo)
        first = torch.stack([sum(e[i]) + out.bias for i in range(n)])
        middle = norm1(first)
        last = down(gelu(up(middle))) + middle
        norms = torch.empty(n, n, dtype=x.dtype)
        for i in range(n):
            for j in range(n):
                norms[i, j] = linear_norm(linear_norm(e[i][j], norm1, first[i]), norm2, last[i]).norm()
        product = norms if product is None else norms @ product
        x = norm2(last)
    row = product[0] / product[0].max()
    return (row - row.min()) / (row.max() - row.min())


def split(parts, bias):
    size = sum((p @ bias).abs() for p in parts) + 1e-12
    return [p + (p @ bias).abs() / size * bias for p in parts]


@torch.no_grad()
def naive_decompx(model, x, dense, classes):
    n = len(x)
    parts = [[x[i] * (i == j) for j in range(n)] for i in range(n)]
    for number, (own, out, norm1, up, down, norm2) in enumerate(parameters(model)):
        x = torch.stack([sum(row) for row in parts])
        attention, new = attention_of(own, x), []
        for i in range(n):
            row = list(parts[i])
            for h in range(2):
                wv, bv, wo = by_head(own, out, h)
                for j in range(n):
                    if number == 0:
                        row[j] = row[j] + attention[h][i, j] * ((x[j] @ wv + bv) @ wo)
                    else:
                        row[j] = row[j] + sum(attention[h][i, k] * (parts[k][j] @ wv @ wo) for k in range(n))
            row = split(row, out.bias if number == 0 else own.value.bias @ out.weight.T + out.bias)
            row = split([linear_norm(e, norm1, sum(row)) for e in row], norm1.bias)
            inner = split([e @ up.weight.T for e in row], up.bias)
            z = sum(inner)
            inner = split([f * (gelu(z) / (z + 1e-12)) @ down.weight.T for f in inner], down.bias)
            row = [e + f for e, f in zip(row, inner, strict=True)]
            new.append(split([linear_norm(e, norm2, sum(row)) for e in row], norm2.bias))
        parts = new
    c = split([e @ dense.weight.T for e in parts[0]], dense.bias)
    z = sum(c)
    return torch.stack(split([e * (z.tanh() / (z + 1e-12)) @ classes.weight.T for e in c], classes.bias))


def layers_of_head(family, model):
    if family == "bert":
        return model.bert.pooler.dense, model.classifier
    return model.classifier.dense, model.classifier.out_proj


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_against_loops(family):
    model = toy.classifier(family)
    (_, x), *_ = encoder.embedded(model, IDS, None)
    torch.testing.assert_close(tc.attribution.globenc(model, IDS)[0], naive_globenc(model, x))
    expected = naive_decompx(model, x, *layers_of_head(family, model))
    torch.testing.assert_close(tc.attribution.decompx(model, IDS)[0], expected)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_padding_and_completeness(family):
    """Contributions add up to the logits of the model itself, and padding on the right changes nothing."""
    model = toy.classifier(family, seed=1)
    ids = torch.full((2, 8), model.config.pad_token_id)
    ids[0, :5], ids[1, :8] = IDS[0], torch.tensor([0, 3, 5, 5, 21, 22, 4, 2])
    mask = ids != model.config.pad_token_id
    if family == "bert":
        mask[:, 0] = True  # token 0 pads
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
    found = tc.attribution.decompx(model, ids, mask)
    torch.testing.assert_close(found.sum(1), logits)
    assert not found[~mask].any()
    torch.testing.assert_close(found[0, :5], tc.attribution.decompx(model, IDS)[0])
    scores = tc.attribution.globenc(model, ids, mask)
    torch.testing.assert_close(scores[0, :5], tc.attribution.globenc(model, IDS)[0])
    assert not scores[~mask].any() and scores.amax(1).tolist() == [1, 1] and scores.min() == 0
    single = tc.attribution.globenc(model, IDS[:, :1])
    assert single.tolist() == [[0.0]]


def test_rows_at_a_time_do_not_matter(monkeypatch):
    model = toy.classifier("bert", seed=2)
    whole = [f(model, IDS) for f in (tc.attribution.globenc, tc.attribution.decompx)]
    monkeypatch.setattr(encoder, "ROWS", 2)
    for one, f in zip(whole, (tc.attribution.globenc, tc.attribution.decompx), strict=True):
        torch.testing.assert_close(f(model, IDS), one)


def test_modes_are_kept_and_half_precision_is_computed_in_float32():
    model = toy.classifier("bert", hidden_dropout_prob=0.5).train()
    model.bert.pooler.eval()
    before = [m.training for m in model.modules()]
    assert torch.equal(tc.attribution.decompx(model, IDS), tc.attribution.decompx(model, IDS))
    assert [m.training for m in model.modules()] == before
    assert tc.attribution.globenc(model.bfloat16(), IDS).dtype == torch.float32
    assert tc.attribution.decompx(model, IDS).dtype == torch.float32


def test_refusals():
    model, causal = toy.classifier("bert"), toy.causal()
    for f in (tc.attribution.globenc, tc.attribution.decompx):
        with pytest.raises(TypeError, match="model: expected an encoder of the family bert"):
            f(causal, IDS)
        with pytest.raises(TypeError, match="ids: expected integers"):
            f(model, IDS.float())
        with pytest.raises(ValueError, match="ids: expected"):
            f(model, IDS[0])
        with pytest.raises(ValueError, match="attention_mask: expected padding on the right"):
            f(model, IDS, torch.arange(5)[None])
        with pytest.raises(ValueError, match="attention_mask: expected"):
            f(model, IDS, torch.ones(1, 4, dtype=torch.long))
        with pytest.raises(ValueError, match=r"ids: expected tokens in \[0, 30\), got 0 to 30"):
            f(model, torch.tensor([[0, 30]]))
        for family, most in (("bert", 40), ("roberta", 38)):
            assert f(toy.classifier(family), torch.full((1, most), 5)).shape[1] == most
            with pytest.raises(ValueError, match=f"ids: expected at most {most} tokens in a row, got {most + 1}"):
                f(toy.classifier(family), torch.full((1, most + 1), 5))
    with pytest.raises(TypeError, match="model: expected a sequence classifier"):
        tc.attribution.decompx(model.bert, IDS)
    assert tc.attribution.globenc(model, IDS[:0]).shape == (0, 5)
