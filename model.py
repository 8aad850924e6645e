"""The model of "Visual Instruction Tuning" (Liu et al., 2023, arXiv:2304.08485), section 4.1, figure 1.

    image --CLIP, frozen--> Z_v --projector--> H_v --\
                                                      LLM --> the answer, word by word
    text  ---------- the LLM's embedding ----> H_q --/

CLIP cuts the image into patches and gives one vector for each (Z_v). The projector, one linear layer,
turns each of them into something that the language model takes for the embedding of a word (H_v). From
there on the picture is read like text: the LLM never learns that it has been given an image.

Where its weights come from, and go to, is in weights.py. There is nothing to run in this file.

Dimensions used in the comments below (real parts / toy parts in brackets where they matter):
    B   samples in the batch           T   positions of the longest sequence in the batch
    I   images in the batch            N   patches of one image: (image_size / patch_size)² (256)
    D_v width of CLIP (1024)           D   width of the LLM (2048)
    V   words the LLM knows (32,000)   K   positions of the batch that carry a label
"""

from functools import partial

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionModel

from data import IGNORE_INDEX
from plumbing import UserError

# Attention and MLP: every linear layer of a block in Llama, Qwen, Mistral and Gemma. The embedding and the
# head stay as they are.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Llava(nn.Module):
    """CLIP + projector + LLM. Everything is frozen here; a stage unfreezes what it trains.

    Args:
        vision_tower: a CLIPVisionModel or a SiglipVisionModel.
        llm: any decoder-only language model of transformers.
        image_token_id: the id that marks, in `input_ids`, a position to be filled with an image feature.
        projector: "linear" (LLaVA, the paper) or "mlp" (LLaVA-1.5: two layers with a GELU between).
        vision_layer: which of CLIP's hidden states to read, counted from the end; -2 in LLaVA.
    """

    def __init__(self, vision_tower, llm, image_token_id, projector="linear", vision_layer=-2):
        super().__init__()
        vision_config = vision_tower.config
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens(vision_config)  # N

        # LLaVA reads the layer *before* the last: CLIP's last block gathers what the class token needs for
        # matching whole captions, and the patches lose local detail to it (paper, section 5.2: 0.96 points
        # on ScienceQA). hidden_states has one entry more than there are blocks (the embeddings come first),
        # so hidden_states[-2] is what leaves block n-1. Whatever comes after is computed for nobody: cut.
        blocks_kept = vision_config.num_hidden_layers + 1 + vision_layer
        if not 0 <= blocks_kept <= vision_config.num_hidden_layers:
            raise UserError(f"--vision-layer {vision_layer}: CLIP's hidden states here are -1 (the last) to "
                            f"{-1 - vision_config.num_hidden_layers} (its embeddings)")
        del vision_tower.encoder.layers[blocks_kept:]
        if isinstance(vision_tower, SiglipVisionModel):  # SigLIP norms and pools what leaves its last block
            vision_tower.post_layernorm, vision_tower.head, vision_tower.use_head = nn.Identity(), None, False
        self.vision_tower = vision_tower

        d_v, d = vision_config.hidden_size, llm.get_input_embeddings().embedding_dim
        if projector == "linear":
            self.projector = nn.Linear(d_v, d)  # H_v = W · Z_v + b, equation 1 of the paper
        else:
            self.projector = nn.Sequential(nn.Linear(d_v, d), nn.GELU(), nn.Linear(d, d))
        self.llm = llm
        self._read = None, None  # see _where_read()
        *blocks, last = llm.get_decoder().layers
        for block in blocks:
            block.mlp.forward = partial(self._where_read, block.mlp.forward, 0)
        for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp):
            module.forward = partial(self._where_read, module.forward, 1)

        # Frozen means two things, and people forget the second: no gradient, and (see train()) eval mode.
        self.requires_grad_(False)

    # -- what is trained -----------------------------------------------------------------------------------

    def add_lora(self, config):
        """Puts a LoRA adapter on the LLM, and only there. From here on self.llm is a peft.PeftModel.

        For every weight matrix W of LORA_TARGETS, the layer now computes (Hu et al., arXiv:2106.09685)

            h = W·x + (alpha / r) · B·A·x        A: (r, in), B: (out, r)

        W stays frozen. B starts at zero, so before the first step the model is exactly what stage 1 left;
        A starts random, because with both at zero neither would ever get a gradient.

        The wrapping goes around the LLM alone: given the whole model, the bare names q_proj and v_proj would
        match CLIP's attention as well, and peft would quietly train the encoder.
        """
        self.llm = get_peft_model(self.llm, config)

    def trainable(self):
        """{name: parameter} of everything that a gradient reaches."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def train(self, mode=True):
        """Train mode for what is trained, never for what is frozen.

        `requires_grad_(False)` alone leaves dropout and the like switched on in frozen parts as soon as
        somebody calls model.train(): the frozen "teacher" then gives different features on every pass.
        In CLIP and the LLM only the adapter's own modules (its dropout) follow `mode`.
        """
        super().train(False)
        self.training = mode
        self.projector.train(mode)
        for name, module in self.llm.named_modules():
            if ".lora_" in name:
                module.train(mode)
        return self

    # -- memory and speed: neither changes what is computed ------------------------------------------------

    def checkpoint_activations(self):
        """Less memory for more time: of each block of the LLM only the input is kept for the backward pass,
        and the block is computed again when the gradient reaches it (Chen et al., arXiv:1604.06174).

        transformers has a switch for it that works in train mode only; here the blocks are frozen, and in
        eval mode. use_reentrant=False is the variant that asks for no gradient in the block's input.
        """
        def block(forward, read, *args, **kwargs):
            before, self._read = self._read, read  # the second time, Llava.forward() is over
            try:
                return forward(*args, **kwargs)
            finally:  # the second time is broken off as soon as all that was missing is there
                self._read = before

        def checkpointed(forward, *args, **kwargs):
            return checkpoint(block, forward, self._read, *args, use_reentrant=False, **kwargs)

        for layer in self.llm.get_decoder().layers:
            layer.forward = partial(checkpointed, layer.forward)

    def compile_blocks(self):
        """torch.compile, block by block: all blocks of the LLM have one code, so it is compiled once for all.
        Whole, the model would break into pieces where forward() picks positions: how many, depends on the
        data. dynamic: batches are of many lengths.

        _where_read() is undone, for it makes blocks differ: compiled blocks compute all positions. To be
        called before checkpoint_activations()."""
        for layer in [*self.vision_tower.encoder.layers, *self.llm.get_decoder().layers]:
            for module in layer.modules():
                vars(module).pop("forward", None)
            layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)

    def _where_read(self, forward, which, hidden):
        """An MLP, `forward`, but only at positions where somebody reads what it says; zeros elsewhere.

        Unlike attention, an MLP looks at each position by itself, so it can be spared those that are padding:
        a quarter of a batch of conversations as they come. In the last block, all positions without a label
        are for nobody, since no further block's attention looks there, and with them its queries and what
        attention makes of them; its keys and values are needed everywhere. MLPs are most of a block's work.

            hidden (B, T, D) -> (B·T, D) -> those that are read, (R, D) -> forward -> (R, D') -> (B, T, D')
        """
        read = self._read[which]
        if read is None:  # outside of Llava.forward(): all of them
            return forward(hidden)
        out = forward(hidden.flatten(0, 1).index_select(0, read))  # (R, D')
        everywhere = out.new_zeros(hidden.shape[0] * hidden.shape[1], out.shape[-1])  # (B·T, D')
        return everywhere.index_copy(0, read, out).unflatten(0, hidden.shape[:2])

    # -- forward -------------------------------------------------------------------------------------------

    @torch.no_grad()  # nothing in CLIP is trained: keep none of its activations
    def clip_features(self, pixel_values):
        """Z_v, (I, N, D_v), of pixel_values (I, 3, image_size, image_size)."""
        hidden = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state
        # (I, 1 + N, D_v) -> (I, N, D_v): CLIP's class token comes first, and has no place in the image.
        # SigLIP has none: whoever drops "the first" there loses the top left corner.
        return hidden[:, -self.num_image_tokens:]

    def encode_images(self, pixel_values):
        """Image features in the LLM's space.

        Args:
            pixel_values: (I, 3, image_size, image_size), as ImageProcessor makes them; I may be 0. Or what
                clip_features() made of them, (I, N, D_v), if that was kept (--cache-features).
        Returns:
            image_features: (I, N, D). Source: encode_images() in the reference's llava_arch.py.
        """
        if len(pixel_values) == 0:  # a batch of text alone
            z_v = torch.empty(0, self.num_image_tokens, self.vision_tower.config.hidden_size,
                              device=pixel_values.device)
        else:
            z_v = pixel_values if pixel_values.dim() == 3 else self.clip_features(pixel_values)
        # The projector is trained, so it stays in fp32 and must be given fp32 (autocast lowers it again).
        return self.projector(z_v.to(torch.float32))  # H_v = W · Z_v + b          (I, N, D)

    def embed(self, input_ids, pixel_values):
        """inputs_embeds (B, T, D): the words' embeddings, with image features in the image's positions.

        Raises ValueError if the ids leave room for another number of features than the images have.
        Source: prepare_inputs_labels_for_multimodal() in the reference's llava_arch.py, which splices
        sequences together one by one; here data.py has already written N image ids where the image stands,
        so that shapes, labels and mask are settled before the model sees them.
        """
        is_image = input_ids == self.image_token_id  # (B, T)
        # The image id may lie outside the LLM's vocabulary; any word will do, since it is overwritten.
        inputs_embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # (B, T, D)
        image_features = self.encode_images(pixel_values).to(inputs_embeds.dtype)  # (I, N, D)
        if is_image.sum() != image_features.shape[0] * image_features.shape[1]:
            raise ValueError(f"{is_image.sum()} image positions in input_ids, but "
                             f"{image_features.shape[0]} images with {image_features.shape[1]} features each")
        # Row by row, left to right, the True positions are filled from image_features in the same order.
        # A batch without images passes through here too, with nothing to fill in: the projector is then
        # still part of the graph and gets a zero gradient, which several processes in step rely on.
        return inputs_embeds.masked_scatter(is_image[:, :, None], image_features)

    def forward(self, input_ids, labels, pixel_values, attention_mask):
        """The loss of every supervised token, one by one, for the caller to sum and to divide.

        A mean taken here would weigh every micro-batch alike, however few words it supervises; only the
        training loop knows how many there are in the whole effective batch.

        Args:
            input_ids, labels: (B, T), padded on the right. pixel_values: see encode_images().
            attention_mask: (B, T), True on what is not padding.
        Returns:
            losses: (K,) fp32, -log p(x_t | x_<t, image) in nats, in reading order, row after row
            (equation 3 of the paper: the sum over the answer's tokens).
        """
        # Here, and only here, is the shift: position t is asked for the token at t + 1.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # (B, T) -> (B·T,)
        labelled = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (K,)
        real = attention_mask.flatten().nonzero().squeeze(1)

        inputs_embeds = self.embed(input_ids, pixel_values)
        # The decoder without its head: we want logits for K positions, not for B·T. And without a mask: the
        # padding is on the right, and in a causal model no word looks to the right, so none sees any of it.
        # (What the padding itself computes, nobody reads.) Told of no mask, attention takes its fast causal
        # kernel, which skips the upper half of the T×T scores and keeps none of them. In generate() below,
        # where padding is on the left, the mask is a must.
        self._read = real, labelled  # for _where_read()
        try:
            hidden = self.llm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=None,
                                            use_cache=False).last_hidden_state  # (B, T, D)
        finally:
            self._read = None, None
        # With V = 32,000, logits for the 256 image positions that nobody reads would fill most of the memory.
        logits = self.llm.get_output_embeddings()(hidden.flatten(0, 1)[labelled])  # (K, D) -> (K, V)
        cap = getattr(self.llm.config.get_text_config(), "final_logit_softcapping", None)
        if cap:  # Gemma 2 has this after its head
            logits = cap * torch.tanh(logits / cap)
        return F.cross_entropy(logits.float(), targets[labelled], reduction="none")

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # compiled blocks are made for training: here T grows by one
    def generate(self, input_ids, attention_mask, pixel_values, end_token_ids, max_new_tokens=128,
                 streamer=None):
        """Greedy answers to a batch of prompts.

        Args:
            input_ids, attention_mask: (B, T), padded on the *left*: the next word is appended on the right,
                and must follow the prompt, not padding.
            end_token_ids: a list; a row ends at the first of these. It was trained after every answer: a
                model that has never been shown an end goes on for ever.
            streamer: a transformers TextStreamer, for B = 1.
        Returns:
            (B, <= max_new_tokens) new ids only. Given inputs_embeds instead of ids, transformers' generate()
            has no prompt ids to return: cutting off the prompt once more would eat the answer.
        """
        inputs_embeds = self.embed(input_ids, pixel_values)
        return self.llm.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
            eos_token_id=end_token_ids, pad_token_id=end_token_ids[0], streamer=streamer,
            do_sample=False, temperature=None, top_p=None, top_k=None)  # no leftovers of a sampling config


def num_image_tokens(vision_config):
    return (vision_config.image_size // vision_config.patch_size) ** 2
