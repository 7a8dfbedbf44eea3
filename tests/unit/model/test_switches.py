"""Every switch of the model section compared with a GPT in plain torch, and invariants of the model."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

SWITCHES = {
    "position": ("rope", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("relu2", "swiglu", "gelu"),
    "qk_norm": (True, False),
    "tie_embeddings": (True, False),
    "logit_softcap": (None, 3.0),
    "n_kv_head": (4, 2),
}
EVERY_COMBINATION = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())]


def plain_norm(x, weights, name):
    if name + ".bias" in weights:
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]
        )
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name + ".weight"]


def plain_rotation(x, theta):
    """Rotate [B, H, T, h] as complex numbers: the first half is real, the second imaginary."""
    tokens, half = x.shape[2], x.shape[3] // 2
    angles = torch.outer(torch.arange(tokens).double(), theta ** (-torch.arange(half).double() / half))
    turned = torch.complex(*x.double().split(half, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1).float()


def plain_attention(x, weights, name, s):
    def heads(rows, first, count):
        part = rows[..., first * h : (first + count) * h]
        return part.reshape(*x.shape[:2], count, h).transpose(1, 2)

    h = s.d_model // s.n_head
    rows = F.linear(x, weights[name + "qkv.weight"], weights.get(name + "qkv.bias"))
    q, k = heads(rows, 0, s.n_head), heads(rows, s.n_head, s.n_kv_head)
    v = heads(rows, s.n_head + s.n_kv_head, s.n_kv_head)
    if s.qk_norm:
        q, k = (a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() for a in (q, k))
    if s.position == "rope":
        q, k = plain_rotation(q, s.rope_theta), plain_rotation(k, s.rope_theta)
    k, v = (a.repeat_interleave(s.n_head // s.n_kv_head, dim=1) for a in (k, v))
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(h)).masked_fill(future, -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, weights[name + "output.weight"], weights.get(name + "output.bias"))


def plain_mlp(x, weights, name, activation):
    def linear(part, x):
        return F.linear(x, weights[f"{name}{part}.weight"], weights.get(f"{name}{part}.bias"))

    up = linear("up", x)
    if activation == "swiglu":
        gate = linear("gate", x)
        return linear("down", gate * gate.sigmoid() * up)
    if activation == "relu2":
        return linear("down", up.clamp(min=0) ** 2)
    return linear("down", 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))))


def plain_gpt(weights, s, ids):
    x, at = weights["layers.0.weight"][ids], 1
    if s.position == "learned":
        x, at = x + weights["layers.1.weight"][: ids.shape[1]], 2
    for i in range(at, at + s.n_layer):
        name = f"layers.{i}."
        x = x + plain_attention(plain_norm(x, weights, name + "attention_norm"), weights, name + "attention.", s)
        x = x + plain_mlp(plain_norm(x, weights, name + "mlp_norm"), weights, name + "mlp.", s.activation)
    x = plain_norm(x, weights, f"layers.{at + s.n_layer}")
    head = "layers.0.weight" if s.tie_embeddings else f"layers.{at + s.n_layer + 1}.weight"
    logits = x @ weights[head].t()
    return logits if s.logit_softcap is None else s.logit_softcap * torch.tanh(logits / s.logit_softcap)


@pytest.mark.parametrize("switches", EVERY_COMBINATION, ids=lambda s: "-".join(map(str, s.values())))
def test_every_combination_computes_what_plain_torch_computes(tiny, random_gpt, batch, switches):
    ids, labels = batch
    section = tiny(**switches, rope_theta=300.0)
    model = random_gpt(section)
    output = model(ids, labels=labels)
    output.loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain_gpt(weights, section, ids)
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    assert (output.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, parameter in model.named_parameters():
        scale = weights[name].grad.abs().max()
        assert scale > 0, name
        assert (parameter.grad - weights[name].grad).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_later_token_changes_no_earlier_logit(tiny, random_gpt, batch, position, cap):
    model = random_gpt(tiny(position=position, logit_softcap=cap, qk_norm=True))
    ids = batch[0]
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_logits_are_computed_only_on_access(tiny, random_gpt, batch, monkeypatch):
    model = random_gpt(tiny())
    ids, labels = batch
    calls = []
    monkeypatch.setattr("megagpt.model.layers.project", lambda *a: calls.append(1) or torch.zeros(1))
    output = model(ids, labels=labels)
    assert calls == []
    assert output.logits is output.logits
    assert calls == [1]


def test_the_loss_is_divided_by_the_given_normalizer(tiny, random_gpt, batch):
    model = random_gpt(tiny())
    ids, labels = batch
    valid = int((labels != -100).sum())
    mean, tenth = model(ids, labels=labels).loss, model(ids, labels=labels, normalizer=10.0 * valid).loss
    torch.testing.assert_close(tenth * 10, mean)
    torch.testing.assert_close(model(ids, labels=labels, normalizer=torch.tensor(valid)).loss, mean)


def test_a_batch_of_ignored_labels_has_no_loss_and_no_gradient(tiny, random_gpt, batch):
    model = random_gpt(tiny())
    ids, labels = batch
    loss = model(ids, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())


def test_without_labels_there_is_no_loss(tiny, random_gpt, batch):
    with pytest.raises(ValueError, match="no labels"):
        _ = random_gpt(tiny())(batch[0]).loss


def test_a_tied_matrix_is_one_parameter_in_a_copy_too(tiny, random_gpt, batch):
    section = tiny(tie_embeddings=True)
    model = random_gpt(section)
    clone = copy.deepcopy(model)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    clone.layers[0].weight.data.zero_()
    assert clone(batch[0]).logits.abs().max() == 0
    assert model(batch[0]).logits.abs().max() > 0


def test_training_works_after_evaluation_in_inference_mode(tiny, random_gpt, batch):
    model = random_gpt(tiny(qk_norm=True))
    with torch.inference_mode():
        expected = model(batch[0]).logits
    output = model(batch[0], labels=batch[1])
    output.loss.backward()
    assert torch.equal(output.logits, expected)


def test_bf16_is_close_to_fp32(tiny, random_gpt, batch):
    ids, labels = batch
    model = random_gpt(tiny(qk_norm=True, n_kv_head=2, logit_softcap=5.0))
    exact = model(ids, labels=labels).loss
    rounded = copy.deepcopy(model).bfloat16()
    loss = rounded(ids, labels=labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in rounded.parameters())
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)  # 8 bits of mantissa, two layers


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_the_outputs_of_a_blocks_shards_add_up(tiny, random_gpt, heads, kv_heads):
    """With qkv and up split by columns, output and down by rows, the outputs of two halves add up to the whole."""
    model = random_gpt(tiny(n_head=heads, n_kv_head=kv_heads, qk_norm=True))
    block, context = model.layers[1], model.contexts.for_batch(torch.zeros(2, 16))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    sums = [0.0, 0.0]
    for rank in range(2):
        shard = copy.deepcopy(block)
        parts = shard.attention.qkv.weight.split([heads * 8, kv_heads * 8, kv_heads * 8])
        shard.attention.qkv.weight = torch.nn.Parameter(torch.cat([p.chunk(2)[rank] for p in parts]))
        shard.mlp.up.weight = torch.nn.Parameter(shard.mlp.up.weight.chunk(2)[rank])
        for linear in (shard.attention.output, shard.mlp.down):
            linear.weight = torch.nn.Parameter(linear.weight.chunk(2, dim=1)[rank])
        sums = [sums[0] + shard.attention(x, context), sums[1] + shard.mlp(x)]
    torch.testing.assert_close(sums[0], block.attention(x, context), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[1], block.mlp(x), rtol=1e-5, atol=1e-5)
