r"""The model of "Visual Instruction Tuning" (Liu et al., 2023, arXiv:2304.08485): section 4.1 and figure 1.

    image --CLIP (frozen)--> Z_v --projector--> H_v --\
                                                       LLM --> answer, token by token
    text  ---------- the LLM's embedding ----> H_q ---/

CLIP cuts the image into patches and returns one vector per patch (Z_v). The projector, one linear layer, maps
each of these vectors into the space of the LLM's token embeddings (H_v). From there on the LLM reads the
image like text, whose embeddings are H_q. Nothing marks these positions as an image. They are numbered like
those of a text, in reading order, and attention is causal, so patch k sees itself and what comes before it.
The features themselves tell where a patch is, because CLIP has added position embeddings.

Sizes used in the comments:                                          CLIP ViT-L/14 + TinyLlama       toy
    B    samples in the batch
    T    tokens of the longest sequence in the batch
    I    images in the batch
    S    height and width of an image in pixels                                            224        96
    N    patches of an image, (S / patch size)²                                            256         9
    D_v  width of CLIP                                                                   1,024       128
    D    width of the LLM                                                                2,048       128
    V    size of the LLM's vocabulary                                                   32,000       615
    K    tokens in the batch that the loss is computed on (the labeled ones)

"The original code" in the comments of this project is the authors', github.com/haotian-liu/LLaVA.
"""

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

IGNORE_INDEX = -100  # label of a position that the loss ignores; cross_entropy uses the same default

# The seven linear layers of a block of Llama, Mistral, Qwen2, Qwen3 or Gemma: attention, then MLP.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def count_patches(vision_config):
    """Returns N, the number of patches of one image."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


class Llava(nn.Module):
    """CLIP, projector and LLM. All parameters start frozen; each stage unfreezes what it trains.

    Args:
        vision_tower: a CLIPVisionModel, SiglipVisionModel or Dinov2Model. Its unused blocks are deleted.
        llm: a decoder-only language model of transformers.
        image_token_id: the id in `input_ids` whose positions are filled with image features, one each.
        projector: "linear" (the paper) or "mlp" (LLaVA-1.5: two layers with a GELU between them).
        vision_layer: the hidden state of the vision tower to use, counted from the end. LLaVA uses -2.
    """

    def __init__(self, vision_tower, llm, image_token_id, projector="linear", vision_layer=-2):
        super().__init__()
        config = vision_tower.config
        self.image_token_id = image_token_id
        self.num_image_tokens = count_patches(config)  # N

        # LLaVA uses the features before CLIP's last block, which are 0.96 points better on ScienceQA. The
        # authors suspect that they contain more local detail (section 5.2). hidden_states[0] is the embedding
        # and hidden_states[i] the output of block i, counted from 1. So -2 is the output of the
        # second-to-last block. The blocks after it are deleted, so last_hidden_state is that output. (SigLIP
        # and DINOv2 also normalize all vectors at the end. load_vision_tower() has removed that.)
        kept_blocks = config.num_hidden_layers + 1 + vision_layer
        assert 0 <= kept_blocks <= config.num_hidden_layers, f"no hidden state {vision_layer}"
        del vision_tower.encoder.layers[kept_blocks:]
        self.vision_tower = vision_tower

        d_v, d = config.hidden_size, llm.get_input_embeddings().embedding_dim
        if projector == "linear":
            self.projector = nn.Linear(d_v, d)  # equation 1, plus the bias that the original code has
        else:
            self.projector = nn.Sequential(nn.Linear(d_v, d), nn.GELU(), nn.Linear(d, d))
        self.llm = llm
        self.requires_grad_(False)

    # -- what is trained -----------------------------------------------------------------------------------

    def add_lora(self, config):
        """Adds a LoRA adapter to the LLM. `config` is a peft.LoraConfig.

        For each weight matrix W named in `config.target_modules`, the layer then computes (Hu et al.,
        arXiv:2106.09685)

            h = W·x + (alpha / r) · B·A·dropout(x)        A: (r, in), B: (out, r)

        W stays frozen. B starts at zero, so the adapter adds nothing before the first step. A starts random,
        because if both were zero, both gradients would stay zero.

        The adapter is added to the LLM alone. On the whole model, the names q_proj, k_proj and v_proj would
        match CLIP's attention too. CLIP would get adapters that are saved but never receive a gradient.

        A and B are fp32. If W is in half precision, the model must be called under autocast.
        """
        self.llm = get_peft_model(self.llm, config)
        # Otherwise peft would cast x to fp32, and autocast would cast it back, which costs time and memory.
        for module in self.llm.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False

    def trainable_parameters(self):
        """Returns {name: parameter} of all parameters that are trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_table(self):
        """Returns a table, as text, of the frozen and trained parameters of each component."""
        rows = [f"{'parameters':<16}{'frozen':>16}{'trained':>14}"]
        for name, component in self.named_children():
            frozen = [p for p in component.parameters() if not p.requires_grad]
            trained = [p for p in component.parameters() if p.requires_grad]
            rows.append(f"  {name:<14}{sum(p.numel() for p in frozen):>16,}"
                        f"{sum(p.numel() for p in trained):>14,}"
                        f"  {', '.join(sorted({str(p.dtype) for p in trained}))}")
        return "\n".join(row.rstrip() for row in rows)

    def train(self, mode=True):
        """Puts projector and adapter in train mode. The pretrained layers of CLIP and LLM stay in eval mode.

        `requires_grad_(False)` does not switch off dropout. If a plain model.train() reached the frozen
        components, a model with dropout would return different features for the same image in every step.
        """
        super().train(False)
        self.training = mode
        self.projector.train(mode)
        for name, module in self.llm.named_modules():
            # peft calls the adapter's modules lora_dropout, lora_A and lora_B. The flag of the LLM's blocks
            # is set too, because with --activation-checkpointing transformers recomputes only blocks that are
            # in train mode. The layers inside them stay in eval mode.
            if ".lora_" in name or isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    # -- forward -------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values):
        """Returns H_v, the image features in the LLM's space: (I, 3, S, S) -> (I, N, D). I may be 0.

        Source: encode_images() in the original code's llava_arch.py.
        """
        if len(pixel_values) == 0:  # no images: an empty tensor, so that embed() needs no special case
            z_v = torch.zeros(0, self.num_image_tokens, self.vision_tower.config.hidden_size,
                              device=pixel_values.device)
        else:
            with torch.no_grad():  # CLIP is frozen, so no activations need to be kept
                z_v = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state
            # (I, 1 + N, D_v) -> (I, N, D_v): drop the class token, which comes first and belongs to no patch.
            # We count from the end because SigLIP has no class token.
            z_v = z_v[:, -self.num_image_tokens:]
        # The projector's weights are fp32, so its input must be fp32 too. (Under autocast, both are converted
        # to half precision for the product.)
        return self.projector(z_v.float())  # the linear one: H_v = W · Z_v + b        (I, N, D)

    def embed(self, input_ids, pixel_values):
        """Returns inputs_embeds: token embeddings, with H_v at the image positions. (B, T) -> (B, T, D)

        Raises ValueError if the number of image positions differs from the number of image features.
        Source: prepare_inputs_labels_for_multimodal() in the original code's llava_arch.py. It inserts the
        features here, which changes the length of every sequence. In this project data.py has already written
        N image ids per image, so ids, labels and mask keep their shapes.
        """
        is_image = input_ids == self.image_token_id  # (B, T)
        # The LLM's embedding table may have no row for the image id. Look up id 0; it is overwritten below.
        inputs_embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (B, T, D)
        image_features = self.encode_images(pixel_values).to(inputs_embeds.dtype)  # (I, N, D)
        if is_image.sum() != image_features.shape[0] * image_features.shape[1]:
            raise ValueError(f"{is_image.sum()} image positions in input_ids, but {image_features.shape[0]} "
                             f"images with {image_features.shape[1]} features each")
        # Fills the True positions row by row, left to right, with the features in the same order. A batch
        # without images takes this path too. In stage 1 the loss depends on trained weights only through
        # image_features, and without them backward() would fail.
        return inputs_embeds.masked_scatter(is_image[:, :, None], image_features)

    def forward(self, input_ids, labels, pixel_values, attention_mask):
        """Returns the loss of each labeled token, unreduced: (K,) fp32, in nats.

        For one record, their sum is the negative logarithm of equation 3: -Σ log p(x_t | x_<t, image). The
        training loop adds them up over the effective batch and divides by its number of labeled tokens.

        Args:
            input_ids, labels: (B, T) int64, padded on the right. labels is IGNORE_INDEX except on answers
                and their end tokens, see ChatTemplate.encode().
            pixel_values: (I, 3, S, S).
            attention_mask: (B, T), not used, see below. The log counts tokens with it.
        """
        # The output at position t predicts the token at t + 1, so the targets are the labels, shifted by one.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (B, T) -> (B·T,)
        # The K positions whose next token is labeled. Only they need logits.
        predicting = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (K,)

        # No mask is needed. Padding is on the right, and in a causal model no token attends to what follows
        # it. Without a mask, transformers asks PyTorch for a causal kernel, which can skip half of the T×T
        # attention scores.
        # get_decoder() is the LLM without its head: the blocks and the last norm.
        inputs_embeds = self.embed(input_ids, pixel_values)  # (B, T, D)
        hidden = self.llm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=None,
                                        use_cache=False).last_hidden_state  # (B, T, D)
        # For each position, a row of V = 32,000 fp32 logits takes 128 kB, and the loss needs several copies.
        logits = self.llm.get_output_embeddings()(hidden.flatten(0, 1)[predicting])  # (K, D) -> (K, V)
        return F.cross_entropy(logits.float(), targets[predicting], reduction="none")

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, pixel_values, end_token_ids, max_new_tokens=128,
                 temperature=0.0, streamer=None):
        """Returns the ids of the answers, (B, up to max_new_tokens). A row that ends early is filled up with
        end_token_ids[0]. (self.llm.generate(inputs_embeds=…) would do the same, but would not show how.)

        Args:
            input_ids, attention_mask: (B, T) int64 and bool, padded on the *left*, so that the last position
                of every row is the end of its prompt and predicts the first token of its answer.
            pixel_values: (I, 3, S, S).
            end_token_ids: list of the ids that end an answer.
            temperature: 0 takes the most likely token. Above 0 samples from softmax(logits / temperature).
            streamer: an object with put(ids) and end(), such as transformers' TextStreamer (for B = 1).
        """
        decoder, head = self.llm.get_decoder(), self.llm.get_output_embeddings()
        end_token_ids = torch.tensor(end_token_ids, device=input_ids.device)
        inputs_embeds = self.embed(input_ids, pixel_values)  # (B, T, D)
        # Each row counts its positions after its padding: [pad, pad, a, b] -> [0, 0, 0, 1]
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
        # Keys and values of all positions so far, for every block: (B, key-value heads, positions, head_dim).
        cache = DynamicCache()
        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # (B,)
        answer = []
        for _ in range(max_new_tokens):
            # The first pass reads the whole prompt with the image. Each later pass reads one new token, which
            # attends to the cached keys and values.
            hidden = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=True,
                             position_ids=position_ids, past_key_values=cache).last_hidden_state
            logits = head(hidden[:, -1])  # (B, T, D), later (B, 1, D) -> (B, V): the last position is enough
            if temperature > 0:
                probabilities = torch.softmax(logits.float() / temperature, dim=-1)  # (B, V)
                new_ids = torch.multinomial(probabilities, 1).squeeze(1)  # (B,)
            else:
                new_ids = logits.argmax(dim=-1)  # (B,)
            new_ids = new_ids.masked_fill(finished, end_token_ids[0])
            answer.append(new_ids)
            if streamer:
                streamer.put(new_ids.cpu())
            finished |= torch.isin(new_ids, end_token_ids)
            if finished.all():
                break
            inputs_embeds = self.llm.get_input_embeddings()(new_ids)[:, None]  # (B,) -> (B, 1, D)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)  # (B, T) -> (B, T + 1)
            position_ids = position_ids[:, -1:] + 1  # (B, 1)
        if streamer:
            streamer.end()
        return torch.stack(answer, dim=1)  # (B, number of new tokens)
