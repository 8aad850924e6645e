"""Stage 2, visual instruction tuning (paper, section 4.2, "Stage 2: Fine-tuning End-to-End").

CLIP stays frozen; the projector of stage 1 goes on learning, and the LLM learns with it, to answer what
people ask about an image. The paper trains all of the LLM's weights; here it gets a LoRA adapter, so that one
small GPU will do (the reference offers the same: scripts/v1_5/finetune_lora.sh).

    python stage2_instruct.py                        the toy world: about a minute on 2 CPU cores, loss 0.01
    python stage2_instruct.py --preset tinyllama     LLaVA-Instruct-150K with COCO train2017

Reads <run>/stage1/, writes <run>/stage2/: projector.safetensors, adapter/, run.json, metrics.jsonl.
Then comes sanity_check.py.
"""

import math
from pathlib import Path

import torch
from peft import LoraConfig

import plumbing
from data import IGNORE_INDEX
from evaluate import answer, grounding, held_out_batches
from loading import Windows, check_data, keep_usable, open_datasets
from model import LORA_TARGETS
from runs import Run
from weights import build, load_projector, refuse_other_template

# -- 1. settings: every one of them is a flag --------------------------------------------------------------

PRESETS = {
    "toy": dict(
        run="runs/toy",
        # parts
        vision_tower="toy/clip-vit", vision_layer=-2, image_fit="crop", llm="toy/llama-chat",
        projector="linear",
        # data
        data="toy/data/instruct.json", images="toy/data/images",
        heldout_data="toy/data/heldout_instruct.json", heldout_images="toy/data/heldout.zip", held_out=240,
        limit=0, max_length=256, allow_bad=0.01, workers=0,
        # optimisation
        lr=1.5e-3, projector_lr=5e-4, lora_r=16, lora_alpha=32, lora_dropout=0.05,
        batch_size=32, grad_accum=1, epochs=1, max_steps=None, warmup=0.03, clip=1.0,
        # machine
        precision="auto", device="auto", seed=0, eval_every=94, save_every=100, log_every=10,
    ),
    "tinyllama": dict(
        run="runs/tinyllama",
        vision_tower="openai/clip-vit-large-patch14", vision_layer=-2, image_fit="crop",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0", projector="linear",
        data="data/LLaVA-Instruct-150K/llava_instruct_150k.json", images="data/coco/train2017.zip",
        heldout_data=None, heldout_images=None, held_out=256,
        limit=0, max_length=2048, allow_bad=0.01, workers=2,
        # The reference's LoRA run (v1.5): r 128, alpha 256, lr 2e-4, projector 2e-5, global batch 128, one
        # epoch.
        lr=2e-4, projector_lr=2e-5, lora_r=16, lora_alpha=32, lora_dropout=0.05,
        batch_size=4, grad_accum=32, epochs=1, max_steps=None, warmup=0.03, clip=1.0,
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
    stage1 = Path(args.run) / "stage1"
    stage1_run = plumbing.read_run(stage1, "stage1_align.py", args)
    plumbing.refuse_other_parts(stage1_run, args, stage1)
    run = Run(args, 2, processes)

    # -- 2. model ------------------------------------------------------------------------------------------

    # Frozen weights in `dtype`: half the memory on a GPU, and they need no more, for no step changes them.
    model, template, image_processor = build(args.vision_tower, args.llm, args.projector, args.vision_layer,
                                             dtype, args.image_fit)
    refuse_other_template(template, stage1_run, stage1)
    load_projector(model, stage1 / "projector.safetensors")
    model.add_lora(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                              target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
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
    plumbing.print_sample(dataset[0], template)
    pad_token_id = template.tokenizer.pad_token_id
    held_batches = held_out_batches(held_out, pad_token_id, args.batch_size)

    # -- 4. optimizer --------------------------------------------------------------------------------------

    trained = list(model.trainable().values())
    adapter = [parameter for name, parameter in model.trainable().items() if "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": model.projector.parameters(), "peak_lr": args.projector_lr},
                                   {"params": adapter, "peak_lr": args.lr}], weight_decay=0.0, fused=True)
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
            # Gradients flow back through the frozen weights of the LLM, which keep none, into the adapters
            # beside them and into the projector, where they add up over the micro-batches of the window.
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
    print(f"next: python sanity_check.py{plumbing.same_flags(args)}")


if __name__ == "__main__":
    plumbing.launch(main)
