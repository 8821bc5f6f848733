"""What the benchmarks of this crate compare with: gated linear attention in plain PyTorch, and the Llama of
Hugging Face transformers.

Prints one JSON object a line, {"name", "unit", "value"}; every value is the median of several repetitions
after a warm-up. KILN_BENCH_ONLY=substring runs only the figures whose name contains it.
"""

import json
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

THREADS = 2
CHUNK, SUB_CHUNK = 64, 16
# Chunks whose attention inside the chunk is computed at once: enough for large batched products, few enough
# for the element-wise blocks (SEGMENT · heads · CHUNK · SUB_CHUNK · K floats) to stay near the cache.
SEGMENT = 8
GATE_TEMPERATURE = 16.0
GATE_RANK = 16


def recurrent_gla(q, k, v, g, state=None):
    """Token by token. q, k, g [B, H, T, K]; v [B, H, T, V]; state [B, H, K, V]. Returns o and the last state."""
    batch, heads, length, key = q.shape
    q, decay = q * key**-0.5, g.exp()
    if state is None:
        state = v.new_zeros(batch, heads, key, v.shape[-1])
    outputs = []
    for t in range(length):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outputs, 2), state


def chunk_gla(q, k, v, g, state=None):
    """The same by chunks: matrix products but for the blocks of SUB_CHUNK steps on the diagonal."""
    batch, heads, length, key = q.shape
    value = v.shape[-1]
    q = q * key**-0.5
    # Steps of zeros with gate 1 after the end change nothing.
    missing = -length % CHUNK
    if missing:
        q, k, v, g = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v, g))
    count = (length + missing) // CHUNK
    # [B, H, chunk, step, dim]
    q, k, v, g = (x.reshape(batch, heads, count, CHUNK, -1) for x in (q, k, v, g))
    b = g.cumsum(3)
    total = b[:, :, :, -1:, :]

    # From chunk to chunk: the state before each.
    written = (k * (total - b).exp()).transpose(-1, -2) @ v
    decay = total.exp().transpose(-1, -2)
    if state is None:
        state = v.new_zeros(batch, heads, key, value)
    before = []
    for kept, added in zip(decay.unbind(2), written.unbind(2)):
        before.append(state)
        state = kept * state + added
    carried = (q * b.exp()) @ torch.stack(before, 2)

    inside = [intra_chunk(*parts) for parts in zip(*(x.split(SEGMENT, 2) for x in (q, k, v, b)))]
    o = carried + torch.cat(inside, 2)
    return o.reshape(batch, heads, count * CHUNK, value)[:, :, :length], state


FUTURE = torch.ones(SUB_CHUNK, SUB_CHUNK, dtype=torch.bool).triu(1).unsqueeze(-1)


def intra_chunk(q, k, v, b):
    """Attention of every step to those before it in its chunk, all [B, H, chunk, step, dim]."""
    # Blocks on the diagonal, element by element in log space: [B, H, chunk, block, row, column, K]
    blocks = (CHUNK // SUB_CHUNK, SUB_CHUNK)
    qd, kd, bd, vd = (x.unflatten(3, blocks) for x in (q, k, b, v))
    exponent = (bd.unsqueeze(5) - bd.unsqueeze(4)).masked_fill(FUTURE, -math.inf)
    diagonal = (qd.unsqueeze(5) * exponent.exp() * kd.unsqueeze(4)).sum(-1)
    o = (diagonal @ vd).flatten(3, 4)

    # Blocks below it as products, around the first row of the block: both exponents are at most 0.
    rows = [o[:, :, :, :SUB_CHUNK]]
    for start in range(SUB_CHUNK, CHUNK, SUB_CHUNK):
        block = slice(start, start + SUB_CHUNK)
        reference = b[:, :, :, start : start + 1]
        queries = q[:, :, :, block] * (b[:, :, :, block] - reference).exp()
        keys = k[:, :, :, :start] * (reference - b[:, :, :, :start]).exp()
        rows.append(o[:, :, :, block] + (queries @ keys.transpose(-1, -2)) @ v[:, :, :, :start])
    return torch.cat(rows, 3)


class Gla(nn.Module):
    """The gated linear attention layer: expand_k 0.5, expand_v 1."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, key = heads, width // 2
        self.q_proj = nn.Linear(width, key, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(width, GATE_RANK, bias=False), nn.Linear(GATE_RANK, key))
        self.g_norm = nn.RMSNorm(width // heads, eps=1e-5)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, state=None):
        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        g = split(F.logsigmoid(self.gk_proj(x)) / GATE_TEMPERATURE)
        mix = recurrent_gla if x.shape[1] == 1 else chunk_gla
        o, state = mix(q, k, v, g, state)
        o = self.g_norm(o).transpose(1, 2).flatten(2)
        return self.o_proj(o * F.silu(self.g_proj(x))), state


class SwiGlu(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(width, eps=1e-5), Gla(width, heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(width, eps=1e-5), SwiGlu(width, hidden)

    def forward(self, x, state=None):
        mixed, state = self.attn(self.attn_norm(x), state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


VOCAB, WIDTH, LAYERS, HEADS = 256, 256, 6, 4
HIDDEN = 256 * math.ceil(int(WIDTH * 4 * 2 / 3) / 256)


class GlaLm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH, HEADS, HIDDEN) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids, states=None):
        """Logits [B, T, VOCAB] and the states to continue from."""
        x = self.embeddings(ids)
        after = []
        for layer, state in zip(self.layers, states or [None] * LAYERS):
            x, state = layer(x, state)
            after.append(state)
        return self.lm_head(self.norm(x)), after


def operands(length, gate_scale=1 / GATE_TEMPERATURE, heads=4, key=64, value=128):
    q, k = (torch.randn(1, heads, length, key, requires_grad=True) for _ in range(2))
    v = torch.randn(1, heads, length, value, requires_grad=True)
    g = (F.logsigmoid(torch.randn(1, heads, length, key)) * gate_scale).requires_grad_()
    return q, k, v, g


def check():
    """The chunk form must give what the recurrence gives, gradients included, before its time means anything."""
    for length, gate_scale in [(37, 1 / GATE_TEMPERATURE), (130, 1.0), (100, 60.0)]:
        inputs = operands(length, gate_scale, heads=2, key=8, value=6)
        weight = torch.randn(1, 2, length, 6)
        results = []
        for form in (recurrent_gla, chunk_gla):
            o, state = form(*inputs)
            grads = torch.autograd.grad((o * weight).sum() + state.sin().sum(), inputs)
            results.append([o, state, *grads])
        for found, expected in zip(*results):
            worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
            if not worst <= 1e-4:
                sys.exit(f"the chunk form differs from the recurrence by {worst} at length {length}")


def median_seconds(work, repetitions, warm_up=1):
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def op_milliseconds(form, length, repetitions):
    inputs = operands(length)
    weight = torch.randn(1, 4, length, 128)

    def work():
        o, _ = form(*inputs)
        torch.autograd.grad(o, inputs, weight)

    return 1e3 * median_seconds(work, repetitions)


def train_tokens_per_second(model, logits, repetitions=3, batch=4, length=1024):
    """Forward, backward and one step of AdamW on random bytes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    ids = torch.randint(VOCAB, (batch, length + 1))

    def work():
        optimizer.zero_grad()
        F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return batch * length / median_seconds(work, repetitions)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, max_position_embeddings=2048, attn_implementation="sdpa",
                         bos_token_id=None, eos_token_id=None, use_cache=False)
    return LlamaForCausalLM(config)


@torch.no_grad()
def generate_tokens_per_second(read, tokens=32, repetitions=3):
    """Greedy generation after `read` tokens, which are read by chunks."""
    model = GlaLm().eval()
    logits, states = model(torch.randint(VOCAB, (1, read)))
    token = logits[:, -1:].argmax(-1)

    def work():
        nonlocal token, states
        for _ in range(tokens):
            logits, states = model(token, states)
            token = logits.argmax(-1)

    return tokens / median_seconds(work, repetitions)


def gla_train():
    model = GlaLm()
    return train_tokens_per_second(model, lambda ids: model(ids)[0])


def llama_train():
    model = llama()
    return train_tokens_per_second(model, lambda ids: model(ids).logits)


def figures():
    for length, repetitions in [(512, 9), (2048, 7), (8192, 5), (32768, 3)]:
        yield (f"op fwd+bwd chunk T={length}", "ms",
               lambda: op_milliseconds(chunk_gla, length, repetitions))
    for length, repetitions in [(512, 5), (2048, 3)]:
        yield (f"op fwd+bwd recurrent T={length}", "ms",
               lambda: op_milliseconds(recurrent_gla, length, repetitions))
    yield "lm train tokens/s T=1024", "tokens/s", gla_train
    yield "llama train tokens/s T=1024", "tokens/s", llama_train
    for read in (100, 1000, 10000, 32000):
        yield f"generate tokens/s after {read}", "tokens/s", lambda: generate_tokens_per_second(read)


def main():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    check()
    only = os.environ.get("KILN_BENCH_ONLY", "")
    for name, unit, measure in figures():
        if only in name:
            print(json.dumps({"name": name, "unit": unit, "value": round(measure(), 3)}), flush=True)


if __name__ == "__main__":
    main()
