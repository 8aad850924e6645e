"""A block of Llama in plain tensor code, compared with transformers.

    python -m lessons.solutions.llama_block

Sizes in the comments, besides those of model.py: the queries have h heads of d numbers each, the keys and
values have g heads. h = g = 4 in the toy. TinyLlama has h = 32 and g = 4.
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data import collate
from lessons.toy_parts import load_datasets, load_model
from support.errors import run_script


def rms_norm(x, weight, eps):
    # x / sqrt(mean(x²) + eps) · weight. A layer norm also subtracts the mean and adds a bias.
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """Turns the queries or keys by angles that grow with the position: (B, heads, T, d) -> the same.

    The numbers i and i + d/2 of a vector are a point in the plane. At position t it turns by the angle

        a = t · theta^(-2i/d)

    The product q·k then depends on positions only through their difference.
    """
    length, d = x.shape[2:]
    frequencies = theta ** (-2 * torch.arange(d // 2) / d)  # (d/2,)
    angles = torch.arange(length)[:, None] * frequencies  # (T, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, d/2) each
    # (x, y) -> (x cos a - y sin a, y cos a + x sin a)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x, weights, name, config):
    """Mixes the vectors of the positions up to each one: (B, T, D) -> (B, T, D). There are no biases."""
    d, theta = config.head_dim, config.rope_parameters["rope_theta"]
    q, k, v = ((x @ weights[f"{name}.{part}_proj.weight"].T).unflatten(2, (-1, d)).transpose(1, 2)
               for part in "qkv")  # q: (B, h, T, d); k and v: (B, g, T, d)
    q, k = rotate(q, theta), rotate(k, theta)
    # Each head of keys and values serves h/g neighboring heads of queries, so the cache is h/g times smaller.
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))  # (B, h, T, d)
    # A = softmax(q·k / sqrt(d)), with -∞ instead of q·k where the key comes after the query
    scores = q @ k.transpose(2, 3) / math.sqrt(d)  # (B, h, T, T)
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(diagonal=1)  # (T, T)
    heads = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v  # A·v: (B, h, T, d)
    return heads.transpose(1, 2).flatten(2) @ weights[f"{name}.o_proj.weight"].T  # (B, T, D)


def llama_block(x, weights, name, config):
    """Returns the output of one block: (B, T, D) -> (B, T, D)."""
    # x + attention(norm(x)), then x + MLP(norm(x))
    normed = rms_norm(x, weights[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
    x = x + attention(normed, weights, f"{name}.self_attn", config)
    normed = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = (normed @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    # SwiGLU: down·(silu(gate·x) * up·x) with silu(z) = z · sigmoid(z)
    wide = gate * torch.sigmoid(gate) * up  # (B, T, width of the MLP)
    return x + wide @ weights[f"{name}.mlp.down_proj.weight"].T  # (B, T, D)


@torch.no_grad()
def compare(llm, inputs_embeds):
    """Returns the largest difference from transformers' blocks and logits."""
    weights, config = llm.state_dict(), llm.config
    output = llm(inputs_embeds=inputs_embeds, output_hidden_states=True)
    x, pairs = inputs_embeds, []
    for i in range(config.num_hidden_layers):
        x = llama_block(x, weights, f"model.layers.{i}", config)
        if i + 1 < config.num_hidden_layers:  # transformers returns the last one after the last norm
            pairs.append((x, output.hidden_states[i + 1]))
    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    pairs += [(x, output.hidden_states[-1]), (x @ weights["lm_head.weight"].T, output.logits)]  # (B, T, V)
    for own, theirs in pairs:
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    return max((own - theirs).abs().max().item() for own, theirs in pairs)


def main():
    model, template = load_model()
    train_dataset, _ = load_datasets(template, stage=2)
    batch = collate([train_dataset[i] for i in range(4)], template.pad_token_id)
    with torch.no_grad():
        inputs_embeds = model.embed(batch["input_ids"], batch["pixel_values"])  # (B, T, D)
    # In fp64, rounding does not hide an error. (transformers' norms and angles stay in fp32.)
    largest = compare(model.llm.double(), inputs_embeds.double())
    print(f"the toy's {len(model.llm.model.layers)} blocks, as many heads of keys as of queries: largest "
          f"difference from transformers {largest:.0e}")
    torch.manual_seed(0)
    grouped = LlamaForCausalLM(LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2)).eval()
    print("random weights, 8 heads of queries and 2 of keys: largest difference from transformers "
          f"{compare(grouped.double(), torch.randn(2, 50, 128).double()):.0e}")


if __name__ == "__main__":
    run_script(main)
