"""Stage 2: visual instruction tuning (paper, section 4.2, "Stage 2: Fine-tuning End-to-End").

CLIP stays frozen. This stage continues to train the projector of stage 1, and also trains the LLM, on
conversations about images. The paper trains all weights of the LLM. Here the LLM gets a LoRA adapter, so that
one small GPU is enough (as in the original code's scripts/v1_5/finetune_lora.sh).

    python stage2_instruct.py                      the toy: about 1 minute on 2 CPU cores, held-out loss 0.01
    python stage2_instruct.py --preset tinyllama   the real models and data, see docs/real_data.md

Reads <run>/stage1/. Writes projector.safetensors, adapter/, run.json and metrics.jsonl to <run>/stage2/.
Continue with sanity_check.py. The comments explain what is new; stage1_align.py explains the rest.
"""

import math
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

from data import ChatTemplate
from model import IGNORE_INDEX, LORA_TARGETS, Llava, count_patches
from support import checkpoints
from support.check_records import make_datasets, note_skipped_images
from support.devices import choose_dtype
from support.errors import UserError, explain_errors, run_script
from support.evaluation import evaluate_heldout, make_heldout_batches, mark_labeled
from support.metrics_log import MetricsLog, format_grounding, import_tracker
from support.pretrained import load_language_model, load_vision_config, load_vision_tower
from support.processes import Processes
from support.records import describe_records, open_records
from support.results import (check_same_models, check_same_template, load_projector, read_run,
                             result_checksums, save_result)
from support.settings import next_command, parse_settings, print_settings
from support.step_batches import load_steps, plan_events, plan_steps, print_plan, try_longest_batch

# -- 1. settings: each one is also a flag, see --help ------------------------------------------------------

PRESETS = {
    "toy": dict(
        run="runs/toy",
        # the models
        vision_tower="toy/clip-vit", vision_layer=-2, llm="toy/llama-chat", projector="linear",
        # the data
        data="toy/data/instruct.json", images="toy/data/images",
        heldout_data="toy/data/heldout_instruct.json", heldout_images="toy/data/heldout.zip", heldout=240,
        limit=0,  # no limit
        max_length=256, allow_bad=0.01, workers=0,
        # the optimization
        # No dropout: on a CPU it takes a third of a step, and the toy scores the same without it.
        lr=1.5e-3, projector_lr=5e-4, lora_r=16, lora_alpha=32, lora_dropout=0.0,
        batch_size=32, grad_accum=1, epochs=1, max_steps=None, warmup=0.03, max_grad_norm=1.0,
        # the machine and the log
        precision="auto", device="auto", seed=0, eval_every=40, save_every=100, log_every=5, tracker=None,
    ),
    "tinyllama": dict(
        run="runs/tinyllama",
        vision_tower="openai/clip-vit-large-patch14", vision_layer=-2,
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0", projector="linear",
        data="data/LLaVA-Instruct-150K/llava_instruct_150k.json", images="data/coco/train2017.zip",
        heldout_data=None, heldout_images=None, heldout=256,
        limit=0, max_length=2048, allow_bad=0.01, workers=2,
        # The original code's LoRA script has the same learning rates and effective batch of 128, here 2 × 64.
        # It has r = 128 and alpha = 256. With r = 16 and alpha = 32, alpha / r is the same, and the adapter
        # and its optimizer need an eighth of the memory.
        lr=2e-4, projector_lr=2e-5, lora_r=16, lora_alpha=32, lora_dropout=0.05,
        batch_size=2, grad_accum=64, epochs=1, max_steps=None, warmup=0.03, max_grad_norm=1.0,
        precision="auto", device="auto", seed=0, eval_every=None, save_every=None, log_every=5, tracker=None,
    ),
}


def main(argv=None):
    args = parse_settings(__doc__, PRESETS, argv)
    processes = Processes(args.device)  # one process, or several if torchrun has started this script
    device, dtype = processes.device, choose_dtype(args.precision, processes.device)
    print_settings(args, device, dtype)
    stage1_folder, folder = Path(args.run) / "stage1", Path(args.run) / "stage2"
    stage1_run = read_run(stage1_folder)
    check_same_models(stage1_run, args, stage1_folder)
    settings = {**vars(args), "effective_batch": args.batch_size * args.grad_accum * processes.world_size,
                "stage1_checksum": result_checksums(stage1_folder).get("projector.safetensors")}
    tracker = import_tracker(args.tracker) if args.tracker else None
    checkpoint = None  # begin at step 0
    if not args.check_data:
        checkpoint = checkpoints.lock_and_find_checkpoint(folder, settings, processes)
    torch.manual_seed(args.seed)  # every process must start with the same random weights

    # -- 2. data -------------------------------------------------------------------------------------------

    if args.data.startswith("toy/data/"):
        import toy.world
        toy.world.draw_if_missing()  # draws 12,240 pictures before the first run (about 10 s)
    train_records, heldout_records = open_records(
        args.data, args.images, args.heldout_data, args.heldout_images, args.heldout, args.limit, args.seed)
    template = ChatTemplate(args.llm)
    check_same_template(stage1_run, template, stage1_folder)
    num_image_tokens = count_patches(load_vision_config(args.vision_tower))  # N
    # lengths[i] is the approximate number of tokens of training sample i.
    train_dataset, heldout_dataset, lengths = make_datasets(
        train_records, heldout_records, template, num_image_tokens, args, processes)
    if args.check_data:
        return None
    pad_token_id = template.tokenizer.pad_token_id
    heldout_batches = make_heldout_batches(heldout_dataset, pad_token_id, args.batch_size)
    print("a sample; the tokens in [[ ]] are labeled:")
    print(mark_labeled(*train_dataset.encode(train_dataset.records[0]), template, color=False))

    # -- 3. model ------------------------------------------------------------------------------------------

    clip = load_vision_tower(args.vision_tower, dtype)
    llm = load_language_model(args.llm, dtype, device)
    with explain_errors(f"use --vision-layer {args.vision_layer}"):
        model = Llava(clip, llm, template.image_token_id, args.projector, args.vision_layer).to(device)
    load_projector(model, stage1_folder / "projector.safetensors")
    model.projector.requires_grad_(True)
    # peft creates LoRA's A and B, makes them trainable, and keeps them in fp32 even if W is in half
    # precision. The printed table shows it.
    model.add_lora(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                              target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    torch.manual_seed(args.seed + processes.rank)  # each process draws different dropout masks
    if args.activation_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    print(model.parameter_table())

    # -- 4. optimizer --------------------------------------------------------------------------------------

    parameters = list(model.trainable().values())
    in_llm = [parameter for name, parameter in model.trainable().items() if not name.startswith("projector.")]
    # The projector has already been trained, so it gets a smaller learning rate than the new adapter.
    optimizer = torch.optim.AdamW([{"params": in_llm, "peak_lr": args.lr},
                                   {"params": model.projector.parameters(), "peak_lr": args.projector_lr}],
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # or unscale_() fails in a process without samples
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    # -- 5. the loop ---------------------------------------------------------------------------------------

    records_hash = train_dataset.records.records_hash()  # a resumed run must see the same records
    progress = checkpoints.restore_or_begin(
        checkpoint, folder, model, optimizer, scaler, records_hash, processes)
    steps, step_sizes = plan_steps(lengths, args, processes, progress)
    total_steps = progress.step + len(steps)
    log_at, eval_at, save_at = plan_events(args, total_steps)
    loaded = load_steps(train_dataset, steps, pad_token_id, args.workers, device)
    print_plan(args, processes.world_size, step_sizes, len(train_dataset), len(heldout_dataset), total_steps)
    log = MetricsLog(folder, processes, checkpoint, total_steps, tracker, settings)

    def evaluate():
        with autocast():
            return log.log_heldout(progress.step, *evaluate_heldout(
                model, template, heldout_dataset, heldout_batches, device, processes.map))

    model.train()
    if device.type == "cuda":
        try_longest_batch(model, train_dataset, lengths, pad_token_id, device, autocast, args)
    warmup_steps = max(1, round(args.warmup * total_steps))
    with checkpoints.StopSignal() as stop_signal:  # Ctrl-C or SIGTERM
        if progress.step == 0:
            progress.before = evaluate()
        for step, step_size in zip(steps, step_sizes):
            done = max(0, progress.step - warmup_steps) / max(1, total_steps - warmup_steps)  # 0 … 1
            factor = min(1, (progress.step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

            micro_batches, skipped, seconds_waiting = next(loaded)  # see collate() for what they contain
            note_skipped_images(progress.skipped, skipped, folder, args.allow_bad, len(train_dataset))

            n = processes.sum(sum((b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in micro_batches))
            loss = torch.zeros((), device=device)
            for batch in micro_batches:
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with autocast():
                    losses = model(**batch)  # (K,)
                micro_loss = losses.sum() / n
                # Gradients flow back through the frozen weights into LoRA's A and B, and through the image
                # positions into the projector.
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()

            processes.sum_gradients(parameters)
            loss = processes.sum(loss)
            scaler.unscale_(optimizer)  # so that the true gradient is clipped
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
            checkpoints.stop_if_diverged(progress, loss, grad_norm, scaler, train_dataset.records, step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            progress.step += 1
            progress.samples += step_size
            log.count_step(step_size, micro_batches, seconds_waiting)
            del micro_batches  # before the next ones are loaded
            if progress.step in log_at:
                lr, projector_lr = (group["lr"] for group in optimizer.param_groups)
                log.log_step(progress.step, loss=loss, lr=lr, projector_lr=projector_lr, grad_norm=grad_norm,
                             labeled_tokens=n, samples=progress.samples)
            if progress.step in eval_at and (args.eval_every or log.may_evaluate()):
                evaluate()
            stop = processes.max(stop_signal.number)
            if stop or progress.step in save_at:
                checkpoints.save(folder, progress, model, optimizer, scaler, settings, records_hash, processes)
            if stop:
                log.close()
                checkpoints.exit_after_stop(stop, folder, progress.step, total_steps)

    # -- 6. save -------------------------------------------------------------------------------------------

    after = evaluate()
    log.close()
    if not math.isfinite(after["loss"]):
        raise UserError("the held-out loss is not finite, so the result was not saved; try a lower --lr")
    if processes.rank == 0:
        save_result(folder, 2, model, template, settings, progress.step, after, len(progress.skipped),
                    describe_records(train_dataset.records, heldout_dataset.records))
        checkpoints.discard_checkpoint(folder)
    processes.barrier()
    print(f"before: {format_grounding(progress.before)}\nafter:  {format_grounding(after)}\n"
          f"saved in {folder}; next: {next_command('sanity_check.py', args)}")
    return model


if __name__ == "__main__":
    run_script(main)
