"""Stage 2: visual instruction tuning (paper, section 4.2, "Stage 2: Fine-tuning End-to-End").

CLIP stays frozen. This stage continues to train the projector of stage 1, and also trains the LLM, on
conversations about images. The paper trains all weights of the LLM. Here the LLM gets a LoRA adapter, so that
one small GPU is enough. The original code has a LoRA script, too: scripts/v1_5/finetune_lora.sh.

    python stage2_instruct.py                      the toy: about 1 minute on 2 CPU cores, held-out loss 0.01
    python stage2_instruct.py --preset small       DINOv2 and SmolLM2-135M, see docs/small.md
    python stage2_instruct.py --preset tinyllama   the real models and data, see docs/real_data.md

Reads <run>/stage1/. Writes projector.safetensors, adapter/, run.json, heldout.json and metrics.jsonl to
<run>/stage2/. Continue with sanity_check.py.

stage1_align.py explains what both stages have in common. What is new is marked "New", or is in section 3b.
"""

import math
import shlex
import sys
from functools import partial

import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from data import ChatDataset, ChatTemplate, collate, count_labeled
from model import LORA_TARGETS, Llava, count_patches
from support import checkpoints, evaluation, results, settings, step_batches
from support.errors import run_script
from support.metrics_log import MetricsLog
from support.pretrained import (load_image_processor, load_language_model, load_vision_config,
                                load_vision_tower)
from support.processes import Processes, ignore_signals_in_worker
from support.records import load_records

# stage1_align.py explains the settings. Here the presets have other data and schedules, and set projector_lr
# and lora_*, too.
COMMON = dict(vision_layer=-2, projector="linear", heldout_data=None, heldout_images=None, limit=0,
              allow_bad=0.01, workers=0, max_steps=None, warmup=0.03, max_grad_norm=1.0, precision="auto",
              device="auto", seed=0, eval_every=None, save_every=None)

PRESETS = {
    "toy": COMMON | dict(
        run="runs/toy",
        vision_tower="toy/clip-vit",
        llm="toy/llama-chat",
        data="toy/data/instruct.json",        # records: an image and a conversation about it
        images="toy/data/images",             # not the images of stage 1
        heldout_data="toy/data/heldout_instruct.json",
        heldout_images="toy/data/heldout.zip",
        heldout=240,
        max_length=256,
        lr=1.5e-3,                            # of the adapter, whose output starts at zero
        projector_lr=5e-4,                    # of the projector, which is trained already
        lora_r=16,                            # rank of the adapter's matrices A and B
        lora_alpha=32,                        # their product is scaled by lora_alpha / lora_r
        lora_dropout=0.0,                     # without dropout a step is faster
        batch_size=32,
        grad_accum=1,
        epochs=1,
        eval_every=40,
        save_every=100),
    "small": COMMON | dict(
        run="runs/small",
        vision_tower="data/small/encoder",
        vision_layer=-4,
        llm="data/small/llm",
        data="data/small/pictures/conversations.json",
        images="data/small/pictures/images.zip",
        heldout_data="data/small/pictures/heldout_conversations.json",
        heldout_images="data/small/pictures/images.zip",
        heldout=368,
        max_length=256,
        lr=1e-3,
        projector_lr=5e-4,
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        batch_size=8,
        grad_accum=1,
        epochs=5,
        eval_every=250),
    "tinyllama": COMMON | dict(
        run="runs/tinyllama",
        vision_tower="openai/clip-vit-large-patch14",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        data="data/LLaVA-Instruct-150K/llava_instruct_150k.json",
        images="data/coco/train2017.zip",
        heldout=256,
        max_length=2048,
        workers=2,
        lr=2e-4,                              # the original LoRA script's; the paper: 2e-5 for the whole LLM
        projector_lr=2e-5,                    # the script's; low, so that the projector forgets little
        lora_r=16,                            # the script's is 128, an adapter eight times as large
        lora_alpha=32,                        # the script's is 256, so alpha / r is the same
        lora_dropout=0.05,
        batch_size=2,
        grad_accum=64,                        # 2 × 64 = 128 samples per step, as in the script
        epochs=1),                            # the script's; the paper trains 3 epochs, 32 samples per step
}


def main(argv=None):
    """Returns the trained model, or None with --check-data. argv: the flags (None: of the command line)."""
    # -- 1. settings, processes, folder --------------------------------------------------------------------

    args = settings.parse_settings(__doc__, PRESETS, argv)
    processes = Processes(args.device, args.precision)
    device, dtype = processes.device, processes.dtype
    # New: stage 1 must be finished, and trained with the same models. (--check-data does not need it.)
    stage1_path = None if args.check_data else results.find_stage1(args)
    stage_folder = checkpoints.open_folder(args, stage=2, processes=processes)

    # -- 2. data -------------------------------------------------------------------------------------------

    image_processor = load_image_processor(args.vision_tower)
    vision_config = load_vision_config(args.vision_tower, args.vision_layer)
    template = ChatTemplate(args.llm, num_image_tokens=count_patches(vision_config))
    train_records, heldout_records, lengths = load_records(args, template)
    train_dataset = ChatDataset(train_records, template, image_processor, args.max_length)
    heldout_dataset = ChatDataset(heldout_records, template, image_processor, args.max_length)
    heldout_batches = evaluation.make_heldout_batches(heldout_dataset, args.batch_size)
    evaluation.print_first_sample(train_dataset)
    if args.check_data:
        return None

    # -- 3. model ------------------------------------------------------------------------------------------

    vision_tower = load_vision_tower(args.vision_tower, dtype)
    llm = load_language_model(args.llm, dtype, for_device=device)
    torch.manual_seed(args.seed)
    model = Llava(vision_tower, llm, template.image_token_id, args.projector, args.vision_layer)
    model.projector.requires_grad_(True)
    if args.activation_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})

    # -- 3b. new in stage 2: the projector of stage 1, and LoRA --------------------------------------------

    results.load_projector(model, stage1_path)
    # peft creates LoRA's A and B. They are trainable, and in fp32 even if W is in half precision.
    model.add_lora(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                              target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))

    # Train mode for projector and adapter.
    model.to(device).train()
    print(model.parameter_table())

    # -- 4. optimizer --------------------------------------------------------------------------------------

    # New: two learning rates. The projector has been trained before, and the adapter is new. (The log calls
    # the first group's rate lr and the second's projector_lr.)
    adapter_parameters = [parameter for parameter in model.llm.parameters() if parameter.requires_grad]
    projector_parameters = list(model.projector.parameters())
    parameters = adapter_parameters + projector_parameters
    optimizer = torch.optim.AdamW([{"params": adapter_parameters, "peak_lr": args.lr},
                                   {"params": projector_parameters, "peak_lr": args.projector_lr}],
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    step_batches.try_longest_batch(model, train_dataset, lengths, autocast, scaler, args)

    # -- 5. begin or resume, and the batches ---------------------------------------------------------------

    if stage_folder.checkpoint is None:
        progress = stage_folder.start_new(train_records, heldout_records)
    else:
        progress = stage_folder.restore(model, optimizer, scaler, train_records, heldout_records)
    plan = step_batches.plan_steps(lengths, args, processes, progress)
    total_steps = progress.steps_taken + len(plan)
    eval_every = args.eval_every or math.ceil(total_steps / 10)
    save_every = args.save_every or min(100, math.ceil(total_steps / 20))
    loader = DataLoader(
        train_dataset, batch_sampler=[indices for step in plan for indices in step.sample_lists],
        collate_fn=partial(collate, pad_token_id=template.pad_token_id),
        num_workers=args.workers, worker_init_fn=ignore_signals_in_worker,
        prefetch_factor=step_batches.prefetch_factor(args.workers, args.grad_accum),
        pin_memory=device.type == "cuda")
    log = MetricsLog(stage_folder, progress, total_steps)

    def evaluate():
        """Logs and returns the held-out loss with the correct and with a different image, and logs an answer.
        All processes evaluate the same records."""
        with autocast():
            metrics, example = evaluation.evaluate_heldout(model, heldout_dataset, heldout_batches)
        log.log_heldout(metrics, **example)
        return metrics

    # -- 6. the loop ---------------------------------------------------------------------------------------

    # This is the loop of stage 1, line by line, and one new line for dropout.
    warmup_steps = max(1, round(args.warmup * total_steps))
    with checkpoints.StopSignal() as stop_signal:
        if progress.steps_taken == 0:
            progress.first_metrics = evaluate()
        batches = iter(loader)
        for step in plan:
            warmup_factor = min(1, (progress.steps_taken + 1) / warmup_steps)
            decay_ratio = max(0, progress.steps_taken - warmup_steps) / max(1, total_steps - warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * decay_ratio))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * warmup_factor * cosine
            # New: dropout's random numbers depend on step and process, so a run that is resumed with as many
            # processes and the same micro-batches draws the same.
            torch.manual_seed(args.seed + progress.steps_taken * processes.world_size + processes.rank)

            micro_batches, skipped, seconds_waiting = step_batches.next_micro_batches(batches, step)
            log.report_skipped(skipped, len(train_dataset), args.allow_bad)

            local_labeled = sum(count_labeled(batch).sum().item() for batch in micro_batches)
            num_labeled = processes.sum(local_labeled)
            local_loss = torch.zeros((), device=device)
            for batch in micro_batches:
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with autocast():
                    token_losses = model(**batch)  # (K,)
                micro_loss = token_losses.sum() / num_labeled
                # New: gradients flow back through the frozen weights into LoRA's A and B, and through the
                # image positions into the projector.
                scaler.scale(micro_loss).backward()
                local_loss += micro_loss.detach()

            processes.sum_gradients(parameters)
            loss = processes.sum(local_loss)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
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
    print("next: python sanity_check.py --run", shlex.quote(str(args.run)))
    return model


if __name__ == "__main__":
    run_script(main)
