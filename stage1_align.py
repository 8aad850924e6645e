"""Stage 1, feature alignment (paper, section 4.2, "Stage 1: Pre-training for Feature Alignment").

CLIP and the LLM stay frozen; only the projector between them learns, from image-caption pairs. What it learns
is a dictionary: from what CLIP says about a patch to vectors that the LLM can read as words.

    python stage1_align.py                        the toy world: about a minute on 2 CPU cores, loss 0.02
    python stage1_align.py --preset tinyllama     CLIP ViT-L/14 + TinyLlama on LLaVA-CC3M-Pretrain-595K

Writes <run>/stage1/: projector.safetensors, run.json, metrics.jsonl. Then comes stage2_instruct.py.
`diff stage1_align.py stage2_instruct.py` shows what the two stages have in common, and what they do not.
"""

import math

import torch

import plumbing
from data import IGNORE_INDEX
from evaluate import answer, grounding, held_out_batches
from loading import FeatureCache, Windows, check_data, keep_usable, open_datasets
from runs import Run
from weights import build

# -- 1. settings: every one of them is a flag --------------------------------------------------------------

PRESETS = {
    "toy": dict(
        run="runs/toy",
        # parts
        vision_tower="toy/clip-vit", vision_layer=-2, image_fit="crop", llm="toy/llama-chat",
        projector="linear",
        # data
        data="toy/data/chat.json", images="toy/data/images.zip",
        heldout_data="toy/data/heldout_chat.json", heldout_images="toy/data/heldout.zip", held_out=240,
        cache_features=None,
        limit=0, max_length=256, allow_bad=0.01, workers=0,
        # optimisation
        lr=1e-2, batch_size=32, grad_accum=1, epochs=2, max_steps=None, warmup=0.03, clip=1.0,
        # machine
        precision="auto", device="auto", seed=0, eval_every=188, save_every=100, log_every=10,
    ),
    "tinyllama": dict(
        run="runs/tinyllama",
        vision_tower="openai/clip-vit-large-patch14", vision_layer=-2, image_fit="crop",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0", projector="linear",
        data="data/LLaVA-CC3M-Pretrain-595K/chat.json", images="data/LLaVA-CC3M-Pretrain-595K/images.zip",
        heldout_data=None, heldout_images=None, held_out=256, cache_features=None,
        limit=0, max_length=2048, allow_bad=0.01, workers=2,
        # The reference: lr 2e-3, global batch 128, one epoch, cosine, 3% warm-up, no weight decay.
        lr=2e-3, batch_size=16, grad_accum=8, epochs=1, max_steps=None, warmup=0.03, clip=1.0,
        precision="auto", device="auto", seed=0, eval_every=250, save_every=100, log_every=10,
    ),
}


def main():
    args = plumbing.parse_settings(__doc__, PRESETS)
    processes = plumbing.Processes(args.device)
    device = processes.device
    plumbing.print_settings(args)
    if args.check_data:
        return check_data(args)
    plumbing.seed_everything(args.seed)
    dtype, why = plumbing.pick_precision(args.precision, device)
    print(f"device {device}, precision {dtype} ({why})")
    run = Run(args, 1, processes)

    # -- 2. model ------------------------------------------------------------------------------------------

    # Frozen weights in `dtype`: half the memory on a GPU, and they need no more, for no step changes them.
    model, template, image_processor = build(args.vision_tower, args.llm, args.projector, args.vision_layer,
                                             dtype, args.image_fit)
    model.to(device)
    # What is trained stays in fp32: lr · gradient is often smaller than half precision can add to a weight.
    model.projector.requires_grad_(True)
    if args.compile:
        model.compile_blocks()
    if args.activation_checkpointing:  # around the compiled blocks, not inside
        model.checkpoint_activations()
    plumbing.print_parameters(model)

    # -- 3. data -------------------------------------------------------------------------------------------

    dataset, held_out = open_datasets(args, template, image_processor, model.num_image_tokens)
    keep_usable(dataset, args.allow_bad)
    keep_usable(held_out, args.allow_bad)
    if args.cache_features:
        dataset.features = FeatureCache(args.cache_features, dataset, model, args, processes)
    plumbing.print_sample(dataset[0], template)
    pad_token_id = template.tokenizer.pad_token_id
    held_batches = held_out_batches(held_out, pad_token_id, args.batch_size)

    # -- 4. optimizer --------------------------------------------------------------------------------------

    trained = list(model.trainable().values())
    optimizer = torch.optim.AdamW([{"params": trained, "peak_lr": args.lr}], weight_decay=0.0, fused=True)
    # fp16 reaches down to 6e-8: most gradients would round to zero. The scaler multiplies the loss, and with
    # it every gradient, by a large number, and divides it out again before the step. bf16 has fp32's range
    # and fp32 needs no help: there the scaler is switched off, and the calls below do nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # -- 5. the loop ---------------------------------------------------------------------------------------

    run.start(model, template, optimizer, scaler)
    windows = Windows(dataset, args, pad_token_id, processes, run.samples, run.step)
    plumbing.print_plan(args, processes, len(dataset), len(held_out), windows.total_steps)
    run.open_log(windows.total_steps, len(dataset))

    def look():
        """Held-out losses and one answer: is it the image that it talks about?"""
        measured = grounding(model, held_batches, device)
        prompt, truth = held_out.question(0)
        said = answer(model, template, [prompt], device, max_new_tokens=64)[0]
        run.log.held_out(run.step, measured, said, truth)
        return measured

    model.train()
    if run.step == 0:
        run.before = look()
    for step, window in enumerate(windows, start=run.step + 1):
        # Warm-up, for Adam's first steps are large whatever the gradient; then half a cosine, down to zero.
        warmup_steps = max(1, round(args.warmup * windows.total_steps))
        progress = max(0, step - 1 - warmup_steps) / max(1, windows.total_steps - warmup_steps)  # 0 … 1
        factor = min(1, step / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        # The loss is a mean over the supervised tokens of the *whole* effective batch:
        #     L = 1/n · Σ over micro-batches Σ over their tokens  -log p(x_t | x_<t, image)
        # The usual way, loss.mean() / grad_accum, is a mean of means: a token among short answers would weigh
        # more than one among long answers, and accumulation would not equal the large batch.
        n = processes.sum(sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in window.batches))
        loss = torch.zeros((), device=device)
        for batch in window.batches:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            # Autocast computes matrix products in half precision and keeps what needs the range in fp32.
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                losses = model(**batch)  # (K,)
            micro_loss = losses.sum() / n
            # Gradients flow back through the frozen LLM, which keeps none, into the projector, where they add
            # up over the micro-batches of the window.
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()  # not .item(): that would wait for the GPU in every micro-batch

        # Several processes: each has the gradient of its share, and n was that of all, so the sum is the
        # gradient of the whole batch. (DistributedDataParallel does the same, but takes the mean.)
        processes.sum_gradients(trained)
        loss = processes.sum(loss)
        scaler.unscale_(optimizer)  # before clipping: the norm must be that of the true gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        run.check_finite(loss, grad_norm, window)
        scaler.step(optimizer)  # leaves the step out if a gradient overflowed
        scaler.update()  # and then tries a smaller scale, or now and then a larger one
        optimizer.zero_grad(set_to_none=True)

        run.step_done(window, loss=loss, lr=group["lr"], grad_norm=grad_norm, supervised_tokens=n)
        if step % args.eval_every == 0 and step < windows.total_steps:
            look()
        run.save_if_due()

    # -- 6. save -------------------------------------------------------------------------------------------

    after = look()
    run.finish(after)
    print(f"before: {plumbing.outcome(run.before)}\nafter:  {plumbing.outcome(after)}")
    print(f"peak memory {plumbing.peak_memory(device)}; saved in {run.folder}")
    print(f"next: python stage2_instruct.py{plumbing.same_flags(args, *plumbing.PARTS)}")


if __name__ == "__main__":
    plumbing.launch(main)
