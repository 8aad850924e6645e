"""Computes how long the stages take on a GPU: samples · operations / (peak rate · utilization).

    python -m bench.hours

A multiplication and an addition are two operations. Per sample, with T positions, K of them labeled:

    language model    4 · weights · T                  forward, and backward to the activations only, because
                                                       frozen weights get no gradient
    attention         6 · width · T² · blocks          causal: half of the T×T scores
    LoRA (stage 2)    6 · weights of A and B · T       forward, and backward to activations and weights
    head              4 · width · vocabulary · K
    CLIP              2 · weights · 257 + 4 · width · 257² · blocks      forward only

Nothing is measured. T and K are assumptions (LENGTHS), and so is UTILIZATION. Loading data, evaluations and
checkpoints are not counted.
"""

from bench.speed import LORA, geometry

SAMPLES = {1: 595_375, 2: 157_712}
LENGTHS = {1: (36, 24), 2: (250, 165)}  # {stage: mean number of text tokens, of which labeled}
CARDS = {"T4": 65, "RTX 3090": 71, "L4": 121, "A100": 312, "H100": 989}  # data sheets: dense fp16, TFLOP/s
UTILIZATION = 0.3  # the fraction of the peak rate that a training reaches


def operations(stage):
    """Returns the number of operations of one sample of a stage: forward and backward pass."""
    config = geometry("full")
    clip, llm = config.vision_config, config.text_config
    text_tokens, labeled = LENGTHS[stage]
    d, kv, mlp, blocks = (llm.hidden_size, llm.num_key_value_heads * llm.head_dim, llm.intermediate_size,
                          llm.num_hidden_layers)
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)]
    positions, patches = 1 + config.image_seq_length + text_tokens, 1 + config.image_seq_length
    total = 4 * positions * blocks * sum(i * o for i, o in linear)
    total += 6 * d * positions**2 * blocks + 4 * d * llm.vocab_size * labeled
    if stage == 2:
        total += 6 * positions * blocks * sum(LORA["r"] * (i + o) for i, o in linear)
    block = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    return total + (clip.num_hidden_layers - 1) * (2 * block * patches + 4 * clip.hidden_size * patches**2)


def main():
    print("| computed hours | operations per sample | samples | " + " | ".join(CARDS) + " |\n|" + "--|" * 8)
    for stage, samples in ((1, SAMPLES[1]), (2, SAMPLES[2]), (1, 20_000), (2, 20_000)):
        each = operations(stage)
        hours = (each * samples / (UTILIZATION * tera * 1e12) / 3600 for tera in CARDS.values())
        print(f"| stage {stage} | {each / 1e12:.2f} · 10¹² | {samples:,} | "
              + " | ".join(f"{value:.2g}" for value in hours) + " |")


if __name__ == "__main__":
    main()
