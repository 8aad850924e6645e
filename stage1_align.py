"""Stage 1: feature alignment (paper, section 4.2, "Stage 1: Pre-training for Feature Alignment").

CLIP and the LLM are frozen. Only the projector between them is trained, on image-caption pairs. It learns to
turn each of CLIP's features into a vector that the LLM can read like a token's embedding. The paper describes
this stage as training a visual tokenizer that fits the frozen LLM. We think that the LLM stays frozen because
the projector starts at random. Its first vectors mean nothing to the LLM, and updates computed from them
could damage it.

    python stage1_align.py                      the toy: about 1 minute on 2 CPU cores, held-out loss 0.02
    python stage1_align.py --preset small       DINOv2 and SmolLM2-135M, see docs/small.md
    python stage1_align.py --preset tinyllama   the real models and data, see docs/real_data.md

Writes projector.safetensors, run.json and metrics.jsonl to <run>/stage1/. Continue with stage2_instruct.py.
This prints where the two stages differ, without comments:
    diff <(grep -v '^ *#' stage1_align.py) <(grep -v '^ *#' stage2_instruct.py)
"""

import math
from functools import partial
from pathlib import Path

import torch

from data import ChatTemplate, count_labeled
from model import Llava
from support import checkpoints
from support.check_records import check_and_make_datasets, record_skipped_or_stop
from support.devices import choose_dtype
from support.errors import explain_errors, run_script
from support.evaluation import evaluate_heldout, make_heldout_batches, print_sample
from support.metrics_log import MetricsLog, format_grounding
from support.pretrained import load_language_model, load_vision_tower
from support.processes import Processes
from support.records import open_records
from support.results import save_result
from support.settings import next_command, parse_settings, print_settings
from support.step_batches import load_steps, plan_events, plan_steps, print_plan, try_longest_batch

# -- 1. settings: each one is also a flag, see --help ------------------------------------------------------

COMMON = dict(  # what the presets share; each of them may change it
    vision_layer=-2, projector="linear",
    heldout_data=None, heldout_images=None,  # hold records out of the training data
    limit=0,  # no limit
    allow_bad=0.01, workers=0, grad_accum=1, epochs=1, max_steps=None, warmup=0.03, max_grad_norm=1.0,
    precision="auto", device="auto", seed=0, eval_every=None, save_every=None, log_every=5)

PRESETS = {
    "toy": COMMON | dict(
        run="runs/toy", vision_tower="toy/clip-vit", llm="toy/llama-chat",
        # The images of stage 1 are in a .zip file, and those of stage 2, other pictures, in a folder.
        data="toy/data/chat.json", images="toy/data/images.zip",
        heldout_data="toy/data/heldout_chat.json", heldout_images="toy/data/heldout.zip", heldout=240,
        max_length=256, lr=1e-2, batch_size=32, epochs=2, eval_every=20, save_every=100),
    "small": COMMON | dict(
        # docs/small.md compares the layers -4, -2 and -1.
        run="runs/small", vision_tower="data/small/encoder", vision_layer=-4, llm="data/small/llm",
        data="data/small/pictures/captions.json", images="data/small/pictures/images.zip",
        heldout_data="data/small/pictures/heldout_captions.json",
        heldout_images="data/small/pictures/images.zip", heldout=368,
        max_length=256, lr=5e-3, batch_size=8, epochs=3, eval_every=100),
    "tinyllama": COMMON | dict(
        run="runs/tinyllama", vision_tower="openai/clip-vit-large-patch14",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        data="data/LLaVA-CC3M-Pretrain-595K/chat.json", images="data/LLaVA-CC3M-Pretrain-595K/images.zip",
        heldout=256, max_length=2048, workers=2,
        # The paper has the same learning rate, schedule and effective batch of 128 (here 4 × 32). It does not
        # mention clipping.
        lr=2e-3, batch_size=4, grad_accum=32),
}


def main(argv=None):
    args = parse_settings(__doc__, PRESETS, argv)
    # One process, or several if torchrun has started this script.
    processes = Processes(args.device)
    device, dtype = processes.device, choose_dtype(args.precision, processes.device)
    print_settings(args, device, dtype)
    folder = Path(args.run) / "stage1"
    # run.json and checkpoints store all settings. --resume refuses to change those that alter the result.
    settings = {**vars(args), "effective_batch": args.batch_size * args.grad_accum * processes.world_size}
    checkpoint = checkpoints.lock_and_find_checkpoint_or_exit(folder, settings, processes)
    # Every process must start with the same random weights.
    torch.manual_seed(args.seed)

    # -- 2. data -------------------------------------------------------------------------------------------

    # Before the first run, the toy draws its 12,240 pictures (about 10 s).
    if args.data.startswith("toy/data/"):
        import toy.world
        toy.world.draw_if_missing()
    train_records, heldout_records = open_records(args)
    template = ChatTemplate(args.llm)
    train_dataset, heldout_dataset, lengths = check_and_make_datasets(
        train_records, heldout_records, template, args, processes)
    pad_token_id = template.tokenizer.pad_token_id
    heldout_batches = make_heldout_batches(heldout_dataset, pad_token_id, args.batch_size)
    print_sample(train_dataset)
    if args.check_data:
        return None

    # -- 3. model ------------------------------------------------------------------------------------------

    # Frozen weights are never updated, so half precision is enough on a GPU, and halves their memory.
    vision_tower = load_vision_tower(args.vision_tower, dtype)
    llm = load_language_model(args.llm, dtype, device)
    with explain_errors(f"use --vision-layer {args.vision_layer}"):
        model = Llava(vision_tower, llm, template.image_token_id, args.projector, args.vision_layer)
    model.to(device)
    # The projector was created in fp32 and stays in fp32. bf16 has 8 significant bits, so an update smaller
    # than about 1/500 of the weight would always be rounded away.
    model.projector.requires_grad_(True)
    if args.activation_checkpointing:
        # "Gradient checkpointing" is an older name. PyTorch recommends the variant use_reentrant=False.
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    print(model.parameter_table())

    # -- 4. optimizer --------------------------------------------------------------------------------------

    parameters = list(model.trainable_parameters().values())
    # No weight decay, as in the original code. "peak_lr" is our own key, for the schedule below. fused=True
    # updates all tensors in one kernel.
    optimizer = torch.optim.AdamW([{"params": parameters, "peak_lr": args.lr}], weight_decay=0.0, fused=True)
    # fp16 rounds numbers below 3e-8 to zero, so small gradients would vanish on their way back. The scaler
    # multiplies the loss by a large number, which scales every gradient. unscale_() divides the gradients by
    # it, so that the true gradient is clipped. bf16 and fp32 have a larger range. For them the scaler is
    # disabled: scale() returns the loss unchanged, and step() only calls optimizer.step().
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # Autocast runs matrix products in half precision, and operations such as the loss in fp32.
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    # -- 5. the loop ---------------------------------------------------------------------------------------

    progress = checkpoints.restore_or_clear(
        checkpoint, folder, model, optimizer, scaler, train_dataset.records, processes)
    # sample_indices[k] lists the micro-batches of one optimizer step of this process. Each micro-batch lists
    # the indices of its samples. samples_per_step[k] is the number of samples of that step in all processes.
    sample_indices, samples_per_step = plan_steps(lengths, args, processes, progress)
    total_steps = progress.step + len(samples_per_step)
    log_at, eval_at, save_at = plan_events(args, total_steps)
    step_loader = load_steps(train_dataset, sample_indices, pad_token_id, args.workers, device)
    print_plan(args, processes.world_size, len(train_dataset), len(heldout_dataset), total_steps)
    log = MetricsLog(folder, processes, checkpoint, total_steps)

    def evaluate():
        """Logs the held-out loss with the correct and a different image, an answer, and nearest tokens."""
        with autocast():
            grounding, *example = evaluate_heldout(
                model, template, heldout_dataset, heldout_batches, device, processes.map)
        log.log_heldout(progress.step, grounding, *example)
        return grounding

    model.train()
    # The longest samples may come late in the run. If they do not fit into the GPU's memory, stop now.
    if device.type == "cuda":
        try_longest_batch(model, train_dataset, lengths, pad_token_id, device, autocast, args)
    warmup_steps = max(1, round(args.warmup * total_steps))
    with checkpoints.StopSignal() as stop_signal:
        if progress.step == 0:
            progress.grounding_before = evaluate()
        for indices, num_samples in zip(sample_indices, samples_per_step):
            # Linear warm-up, because Adam's first updates are about as large as lr however small the gradient
            # is. Then half a cosine, towards zero, while `decay` grows from 0 to 1.
            decay = max(0, progress.step - warmup_steps) / max(1, total_steps - warmup_steps)
            lr_factor = min(1, (progress.step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * decay))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor

            # collate() in data.py says what a micro-batch contains.
            micro_batches, skipped, seconds_waiting = next(step_loader)
            record_skipped_or_stop(progress.skipped, skipped, folder, args.allow_bad, len(train_dataset))

            # The loss is the mean over all n labeled tokens of the effective batch, here num_labeled:
            #     L = 1/n · Σ over micro-batches Σ over their labeled tokens  -log p(x_t | x_<t, image)
            # With the usual loss.mean() / grad_accum, every micro-batch has the same weight. A token in a
            # micro-batch with few labeled tokens would then count more than one in a micro-batch with many,
            # and the result would depend on how the batch is split.
            num_labeled = processes.sum(sum(count_labeled(batch).sum() for batch in micro_batches))
            loss = torch.zeros((), device=device)
            for batch in micro_batches:
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with autocast():
                    token_losses = model(**batch)  # (K,)
                micro_loss = token_losses.sum() / num_labeled
                # backward() computes gradients through the frozen LLM, but stores none for its weights. It
                # adds the projector's gradients to those of the previous micro-batches.
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()

            # num_labeled counts the tokens of all processes, and each process has divided its loss by it. So
            # their gradients are added. (DistributedDataParallel would average them.)
            processes.sum_gradients(parameters)
            loss = processes.sum(loss)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            checkpoints.stop_if_diverged(progress, loss, grad_norm, scaler, train_dataset.records, indices)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            progress.step += 1
            progress.samples += num_samples
            log.count_step(num_samples, micro_batches, seconds_waiting)
            # Frees their memory before the next ones are loaded.
            del micro_batches
            if progress.step in log_at:
                log.log_step(progress, optimizer, loss=loss, grad_norm=grad_norm, labeled_tokens=num_labeled)
            # Without --eval-every, evaluations take at most a tenth of the time.
            if progress.step in eval_at and (args.eval_every or log.may_evaluate()):
                evaluate()
            # Not 0 if any process has got Ctrl-C or SIGTERM. Then all processes save and stop.
            stop = processes.max(stop_signal.number)
            if stop or progress.step in save_at:
                checkpoints.save(folder, progress, model, optimizer, scaler, settings, processes)
            if stop:
                log.close_and_exit(stop, progress.step)

    # -- 6. save -------------------------------------------------------------------------------------------

    grounding = evaluate()
    log.close()
    save_result(folder, 1, model, settings, progress, grounding, train_dataset, heldout_dataset, processes)
    print(f"before: {format_grounding(progress.grounding_before)}\nafter:  {format_grounding(grounding)}\n"
          f"saved in {folder}; next: {next_command('stage2_instruct.py', args)}")
    return model


if __name__ == "__main__":
    run_script(main)
