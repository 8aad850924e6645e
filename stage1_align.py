r"""Stage 1: feature alignment (paper, section 4.2, "Stage 1: Pre-training for Feature Alignment").

CLIP and the LLM are frozen. Only the projector between them is trained, on image-caption pairs. It learns to
turn each of CLIP's features into a vector that the LLM can read like a token's embedding. The paper describes
this stage as training a visual tokenizer that fits the frozen LLM. We think that the LLM stays frozen because
the projector starts at random. Its first vectors mean nothing to the LLM, and updates computed from them
could damage it.

    python stage1_align.py                      the toy: about 1 minute on 2 CPU cores, held-out loss 0.02
    python stage1_align.py --preset small       DINOv2 and SmolLM2-135M, see docs/small.md
    python stage1_align.py --preset tinyllama   the real models and data, see docs/real_data.md

Writes projector.safetensors, run.json, heldout.json and metrics.jsonl to <run>/stage1/. Continue with
stage2_instruct.py.

In bash, this prints where main() of the two stages differs, without comments:
    diff -B <(sed -n '/^def main/,$p' stage1_align.py | grep -v '^ *#') \
            <(sed -n '/^def main/,$p' stage2_instruct.py | grep -v '^ *#')
"""

import math
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

from data import ChatDataset, ChatTemplate, collate, count_labeled
from model import Llava, count_patches
from support import checkpoints, evaluation, results, settings, step_batches
from support.errors import run_script
from support.metrics_log import MetricsLog
from support.pretrained import (load_image_processor, load_language_model, load_vision_config,
                                load_vision_tower)
from support.processes import Processes, ignore_signals_in_worker
from support.records import load_records

# What the presets have in common, unless they set it themselves. Each setting is also a flag, see --help.
# (The switches --resume, --restart, --check-data and --activation-checkpointing are off by default.)
COMMON = dict(
    vision_layer=-2,                          # CLIP's output before its last block, see model.py
    projector="linear",                       # or "mlp", as in LLaVA-1.5
    heldout_data=None,                        # file of held-out records; None: they are taken out of `data`
    heldout_images=None,                      # their images
    limit=0,                                  # train on at most this many records; 0: on all
    allow_bad=0.01,                           # a larger fraction of unusable records is an error
    workers=0,                                # processes that load samples; 0: the main process
    max_steps=None,                           # optimizer steps; None: all epochs
    warmup=0.03,                              # fraction of the steps in which the learning rate rises
    max_grad_norm=1.0,                        # gradients with a larger norm are scaled down to it; 0: never
    precision="auto",                         # bf16 on a CUDA GPU, or fp16 if it lacks bf16; else fp32
    device="auto",                            # a GPU if there is one
    seed=0,                                   # of all random numbers
    eval_every=None,                          # steps between two evaluations; None: a tenth of all steps
    save_every=None)                          # steps between two checkpoints; None: a twentieth, at most 100

PRESETS = {
    "toy": COMMON | dict(
        run="runs/toy",                       # the results go to runs/toy/stage1
        vision_tower="toy/clip-vit",          # a small CLIP, trained on drawn colored shapes
        llm="toy/llama-chat",                 # a small Llama, trained on texts about them
        data="toy/data/chat.json",            # records: an image, a question and a caption
        images="toy/data/images.zip",         # a .zip file, or a folder as in stage 2
        heldout_data="toy/data/heldout_chat.json",
        heldout_images="toy/data/heldout.zip",
        heldout=240,                          # evaluate the first 240 records of heldout_data
        max_length=256,                       # longest sample in tokens, image positions included
        lr=1e-2,                              # peak learning rate; so small a model allows a high one
        batch_size=32,                        # samples per micro-batch
        grad_accum=1,                         # micro-batches per optimizer step
        epochs=2,                             # passes over the data
        eval_every=20,
        save_every=100),
    "small": COMMON | dict(
        run="runs/small",
        vision_tower="data/small/encoder",    # DINOv2
        vision_layer=-4,                      # docs/small.md compares the layers -4, -2 and -1
        llm="data/small/llm",                 # SmolLM2-135M
        data="data/small/pictures/captions.json",
        images="data/small/pictures/images.zip",
        heldout_data="data/small/pictures/heldout_captions.json",
        heldout_images="data/small/pictures/images.zip",
        heldout=368,
        max_length=256,
        lr=5e-3,
        batch_size=8,
        grad_accum=1,
        epochs=3,
        eval_every=100),
    "tinyllama": COMMON | dict(
        run="runs/tinyllama",
        vision_tower="openai/clip-vit-large-patch14",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        data="data/LLaVA-CC3M-Pretrain-595K/chat.json",
        images="data/LLaVA-CC3M-Pretrain-595K/images.zip",
        heldout=256,                          # no heldout_data: 256 images, one record of each
        max_length=2048,                      # TinyLlama cannot read more
        workers=2,
        lr=2e-3,                              # this, one epoch and 128 samples per step are the paper's
        batch_size=4,                         # what fits on which GPU: docs/memory_and_speed.md
        grad_accum=32,                        # 4 × 32 = 128 samples per step
        epochs=1),
}


def main(argv=None):
    """Returns the trained model, or None with --check-data. argv: the flags (None: of the command line)."""
    # -- 1. settings, processes, folder --------------------------------------------------------------------

    # The settings of --preset, changed by the other flags. (--data also drops its held-out data.)
    args = settings.parse_settings(__doc__, PRESETS, argv)
    # Joins the processes that torchrun has started, if any (docs/several_gpus.md). From here on, only the
    # first of them, rank 0, prints, and writes to the folder of the run.
    processes = Processes(args.device, args.precision)
    # dtype: precision of the frozen weights and of matrix products. Trained weights are always fp32.
    device, dtype = processes.device, processes.dtype
    # Locks <run>/stage1. Without --resume or --restart, an earlier run in it is an error. Section 5 continues
    # or discards it. If it is finished, --resume ends here. (--check-data does not touch the folder.)
    stage_folder = checkpoints.open_folder(args, stage=1, processes=processes)

    # -- 2. data -------------------------------------------------------------------------------------------

    # Resizes, crops and normalizes images as CLIP expects them.
    image_processor = load_image_processor(args.vision_tower)
    vision_config = load_vision_config(args.vision_tower, args.vision_layer)
    # The LLM's tokenizer and chat template. An image takes N positions in a text, one per patch of CLIP.
    template = ChatTemplate(args.llm, num_image_tokens=count_patches(vision_config))
    # Reads the records of --data, and holds some out unless --heldout-data names others. All are checked now,
    # because a bad one must not stop the run hours later. (Of more than 2,000 training records, images are
    # only looked up, and lengths estimated.) Unusable records are printed and left out. If more than the
    # fraction allow_bad of the training records are unusable, the run ends.
    # lengths[i]: about how many tokens training sample i has.
    train_records, heldout_records, lengths = load_records(args, template)
    train_dataset = ChatDataset(train_records, template, image_processor, args.max_length)
    heldout_dataset = ChatDataset(heldout_records, template, image_processor, args.max_length)
    # The held-out samples that have an image, as batches, which stay in memory.
    heldout_batches = evaluation.make_heldout_batches(heldout_dataset, args.batch_size)
    # Prints the first training sample. The labeled tokens, which the model learns to write, are in [[ ]].
    evaluation.print_first_sample(train_dataset)
    if args.check_data:
        return None

    # -- 3. model ------------------------------------------------------------------------------------------

    # Frozen weights are never updated, so half precision is enough on a GPU, and halves their memory.
    vision_tower = load_vision_tower(args.vision_tower, dtype)
    llm = load_language_model(args.llm, dtype, for_device=device)
    # The projector starts with random weights, the same in all processes and in every run with this seed.
    torch.manual_seed(args.seed)
    model = Llava(vision_tower, llm, template.image_token_id, args.projector, args.vision_layer)
    # Llava() freezes everything. The projector alone is trained, in fp32, because in bf16 an update smaller
    # than about 1/500 of a weight would be rounded away.
    model.projector.requires_grad_(True)
    if args.activation_checkpointing:
        # Saves memory, because the backward pass computes activations again instead of keeping them.
        # use_reentrant=False is the variant that PyTorch recommends.
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    # Train mode for the projector. CLIP and the LLM stay without dropout, see Llava.train().
    model.to(device).train()
    print(model.parameter_table())

    # -- 4. optimizer --------------------------------------------------------------------------------------

    parameters = list(model.trainable_parameters().values())
    # No weight decay, as in the original code. "peak_lr" is not PyTorch's: the loop multiplies it by the
    # schedule. (fused=True updates all weights in a few kernels.)
    optimizer = torch.optim.AdamW([{"params": parameters, "peak_lr": args.lr}], weight_decay=0.0, fused=True)
    # fp16 rounds numbers below 3e-8 to zero. So the scaler multiplies the loss, and with it every gradient,
    # by a large number, and unscale_() divides by it before clipping. In bf16 and fp32 it does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # "with autocast():" runs matrix products in half precision, and operations such as the loss in fp32.
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    # One forward and backward pass of the samples that are probably the longest, so that a lack of memory
    # shows now and not hours later. No weight changes.
    step_batches.try_longest_batch(model, train_dataset, lengths, autocast, scaler, args)

    # -- 5. begin or resume, and the batches ---------------------------------------------------------------

    # Only here is an earlier run deleted or continued, so an error above leaves it as it was.
    if stage_folder.checkpoint is None:
        # Deletes an earlier result, if there is one, and writes heldout.json.
        progress = stage_folder.start_new(train_records, heldout_records)
    else:
        # With --resume: restores weights, optimizer and scaler. If the records have changed, the run ends.
        progress = stage_folder.restore(model, optimizer, scaler, train_records, heldout_records)
    # The steps that remain. Each has a list of sample indices for every micro-batch of this process. The
    # order of the samples depends only on seed and epoch, so a resumed run continues it. Within a step,
    # samples of similar length share a micro-batch, which saves padding.
    plan = step_batches.plan_steps(lengths, args, processes, progress)
    total_steps = progress.steps_taken + len(plan)
    eval_every = args.eval_every or math.ceil(total_steps / 10)
    save_every = args.save_every or min(100, math.ceil(total_steps / 20))
    loader = DataLoader(
        train_dataset, batch_sampler=[indices for step in plan for indices in step.sample_lists],
        # Pads the samples of a micro-batch to the same length.
        collate_fn=partial(collate, pad_token_id=template.pad_token_id),
        # After Ctrl-C, the workers must live on, because the main process needs them to finish its step.
        num_workers=args.workers, worker_init_fn=ignore_signals_in_worker,
        # While the GPU computes a step, the workers prepare the next one.
        prefetch_factor=step_batches.prefetch_factor(args.workers, args.grad_accum),
        # Pinned memory can be copied to the GPU while it computes.
        pin_memory=device.type == "cuda")
    # The progress bar, and the file metrics.jsonl.
    log = MetricsLog(stage_folder, progress, total_steps)

    def evaluate():
        """Logs and returns the held-out loss with the correct and with a different image, and logs an answer.
        All processes evaluate the same records."""
        with autocast():
            metrics, example = evaluation.evaluate_heldout(model, heldout_dataset, heldout_batches)
        log.log_heldout(metrics, **example)
        return metrics

    # -- 6. the loop ---------------------------------------------------------------------------------------

    warmup_steps = max(1, round(args.warmup * total_steps))
    with checkpoints.StopSignal() as stop_signal:
        if progress.steps_taken == 0:
            progress.first_metrics = evaluate()
        batches = iter(loader)
        for step in plan:
            # Linear warm-up, because Adam's first updates are about as large as lr however small the gradient
            # is. Then half a cosine falls towards zero, while decay_ratio grows from 0 to almost 1.
            warmup_factor = min(1, (progress.steps_taken + 1) / warmup_steps)
            decay_ratio = max(0, progress.steps_taken - warmup_steps) / max(1, total_steps - warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * decay_ratio))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * warmup_factor * cosine

            # All micro-batches of the step, because their labeled tokens are counted before the first loss.
            micro_batches, skipped, seconds_waiting = step_batches.next_micro_batches(batches, step)
            # Prints records that turned out to be unusable, such as a broken image. Too many end the run.
            log.report_skipped(skipped, len(train_dataset), args.allow_bad)

            # The loss is the mean over all n labeled tokens of the effective batch (n is num_labeled below):
            #
            #     L = 1/n · Σ over micro-batches Σ over their labeled tokens  -log p(x_t | x_<t, image)
            #
            # With loss.mean() / grad_accum, which many training loops have, every micro-batch has the same
            # weight. A token in a micro-batch with few labeled tokens would then count more than one in a
            # micro-batch with many, and the result would depend on how the batch is split.
            local_labeled = sum(count_labeled(batch).sum().item() for batch in micro_batches)
            num_labeled = processes.sum(local_labeled)
            local_loss = torch.zeros((), device=device)
            for batch in micro_batches:
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with autocast():
                    token_losses = model(**batch)  # (K,)
                micro_loss = token_losses.sum() / num_labeled
                # backward() passes gradients through the frozen LLM, but stores none for its weights. It adds
                # the projector's gradients to those of the previous micro-batches.
                scaler.scale(micro_loss).backward()
                local_loss += micro_loss.detach()

            # num_labeled counts the tokens of all processes, and each process has divided its loss by it. So
            # their gradients are added. (DistributedDataParallel would average them.)
            processes.sum_gradients(parameters)
            loss = processes.sum(local_loss)
            scaler.unscale_(optimizer)
            # Scales down gradients whose norm is too large. If max_grad_norm is 0, it only computes the norm.
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            # A loss or gradient that is not finite would spoil all weights. In fp16 an overflow is normal, so
            # step() then changes nothing, update() lowers the scale, and only ten in a row stop the run.
            step_batches.stop_if_diverged(progress, loss, grad_norm, scaler, train_records, step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            progress.steps_taken += 1
            progress.samples_seen += step.num_samples
            log.log_step(optimizer, micro_batches, seconds_waiting,
                         loss=loss, grad_norm=grad_norm, labeled_tokens=num_labeled)
            if progress.steps_taken % eval_every == 0 and progress.steps_taken < total_steps:
                evaluate()
            # The number of the signal, or 0. If a process has received Ctrl-C or SIGTERM, all save and stop.
            # The last step is saved, too, so that a kill during the final evaluation loses nothing.
            stop = processes.max(stop_signal.number)
            if stop or progress.steps_taken % save_every == 0 or progress.steps_taken == total_steps:
                stage_folder.save_checkpoint(progress, model, optimizer, scaler)
            if stop:
                log.close_unfinished()
                sys.exit(128 + stop)

    # -- 7. save -------------------------------------------------------------------------------------------

    metrics = evaluate()
    log.close()
    results.save_result(stage_folder, model, progress, metrics)
    print("next:", settings.stage2_command(args, PRESETS[args.preset]))
    return model


if __name__ == "__main__":
    run_script(main)
