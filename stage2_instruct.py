"""Stage 2: visual instruction tuning (paper, section 4.2, "Stage 2: Fine-tuning End-to-End").

CLIP stays frozen. This stage continues to train the projector of stage 1, and also trains the LLM, on
conversations about images. The paper trains all weights of the LLM. Here the LLM gets a LoRA adapter, so that
one small GPU is enough. The original code has a LoRA script, too: scripts/v1_5/finetune_lora.sh.

    python stage2_instruct.py                      the toy: about 1 minute on 2 CPU cores, held-out loss 0.01
    python stage2_instruct.py --preset small       DINOv2 and SmolLM2-135M, see docs/small.md
    python stage2_instruct.py --preset tinyllama   the real models and data, see docs/real_data.md

Reads <run>/stage1/. Writes projector.safetensors, adapter/, run.json and metrics.jsonl to <run>/stage2/.
Continue with sanity_check.py. stage1_align.py explains what both stages have in common. What is new, from top
to bottom:
  * The run of stage 1 is read. Its models and its chat template must be those of this stage.
  * Its projector is loaded.
  * The LLM gets a LoRA adapter.
  * Each process draws its own dropout masks.
  * Adapter and projector have different learning rates.
"""

import math
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

from data import ChatTemplate, count_labeled
from model import LORA_TARGETS, Llava
from support import checkpoints
from support.check_records import check_and_make_datasets, record_skipped_or_stop
from support.devices import choose_dtype
from support.errors import explain_errors, run_script
from support.evaluation import evaluate_heldout, make_heldout_batches, print_sample
from support.metrics_log import MetricsLog, format_grounding
from support.pretrained import load_language_model, load_vision_tower
from support.processes import Processes
from support.records import open_records
from support.results import check_same_template, load_projector, read_matching_run, save_result
from support.settings import next_command, parse_settings, print_settings
from support.step_batches import load_steps, plan_events, plan_steps, print_plan, try_longest_batch

# -- 1. settings: each one is also a flag, see --help ------------------------------------------------------

COMMON = dict(
    vision_layer=-2, projector="linear", heldout_data=None, heldout_images=None, limit=0, allow_bad=0.01,
    workers=0, lora_r=16, lora_alpha=32, lora_dropout=0.05,
    grad_accum=1, epochs=1, max_steps=None, warmup=0.03, max_grad_norm=1.0,
    precision="auto", device="auto", seed=0, eval_every=None, save_every=None, log_every=5)

PRESETS = {
    "toy": COMMON | dict(
        run="runs/toy", vision_tower="toy/clip-vit", llm="toy/llama-chat",
        data="toy/data/instruct.json", images="toy/data/images",
        heldout_data="toy/data/heldout_instruct.json", heldout_images="toy/data/heldout.zip", heldout=240,
        # No dropout: on a CPU it takes a third of a step, and the toy scores the same without it.
        max_length=256, lr=1.5e-3, projector_lr=5e-4, lora_dropout=0.0, batch_size=32,
        eval_every=40, save_every=100),
    "small": COMMON | dict(
        run="runs/small", vision_tower="data/small/encoder", vision_layer=-4, llm="data/small/llm",
        data="data/small/pictures/conversations.json", images="data/small/pictures/images.zip",
        heldout_data="data/small/pictures/heldout_conversations.json",
        heldout_images="data/small/pictures/images.zip", heldout=368, max_length=256, batch_size=8,
        lr=1e-3, projector_lr=5e-4, lora_dropout=0.0, epochs=5, eval_every=250),
    "tinyllama": COMMON | dict(
        run="runs/tinyllama", vision_tower="openai/clip-vit-large-patch14",
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        data="data/LLaVA-Instruct-150K/llava_instruct_150k.json", images="data/coco/train2017.zip",
        heldout=256, max_length=2048, workers=2,
        # The original code's LoRA script has the same learning rates and effective batch of 128, here 2 × 64.
        # It has r = 128 and alpha = 256. With r = 16 and alpha = 32, alpha / r is the same, and the adapter
        # and its optimizer need an eighth of the memory.
        lr=2e-4, projector_lr=2e-5, batch_size=2, grad_accum=64),
}


def main(argv=None):
    args = parse_settings(__doc__, PRESETS, argv)
    processes = Processes(args.device)
    device, dtype = processes.device, choose_dtype(args.precision, processes.device)
    print_settings(args, device, dtype)
    stage1_folder, folder = Path(args.run) / "stage1", Path(args.run) / "stage2"
    stage1_run = read_matching_run(stage1_folder, args)
    settings = {**vars(args), "effective_batch": args.batch_size * args.grad_accum * processes.world_size,
                "stage1_checksum": stage1_run["checksums"]["projector.safetensors"]}
    checkpoint = checkpoints.lock_and_find_checkpoint_or_exit(folder, settings, processes)
    torch.manual_seed(args.seed)

    # -- 2. data -------------------------------------------------------------------------------------------

    if args.data.startswith("toy/data/"):
        import toy.world
        toy.world.draw_if_missing()
    train_records, heldout_records = open_records(args)
    template = ChatTemplate(args.llm)
    check_same_template(stage1_run, template, stage1_folder)
    train_dataset, heldout_dataset, lengths = check_and_make_datasets(
        train_records, heldout_records, template, args, processes)
    pad_token_id = template.tokenizer.pad_token_id
    heldout_batches = make_heldout_batches(heldout_dataset, pad_token_id, args.batch_size)
    print_sample(train_dataset)
    if args.check_data:
        return None

    # -- 3. model ------------------------------------------------------------------------------------------

    vision_tower = load_vision_tower(args.vision_tower, dtype)
    llm = load_language_model(args.llm, dtype, device)
    with explain_errors(f"use --vision-layer {args.vision_layer}"):
        model = Llava(vision_tower, llm, template.image_token_id, args.projector, args.vision_layer)
    model.to(device)
    load_projector(model, stage1_folder / "projector.safetensors")
    model.projector.requires_grad_(True)
    # peft creates LoRA's A and B. They are trainable, and in fp32 even if W is in half precision.
    model.add_lora(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                              target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    torch.manual_seed(args.seed + processes.rank)  # each process draws different dropout masks
    if args.activation_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    print(model.parameter_table())

    # -- 4. optimizer --------------------------------------------------------------------------------------

    adapter_parameters = [parameter for parameter in model.llm.parameters() if parameter.requires_grad]
    parameters = [*adapter_parameters, *model.projector.parameters()]
    # The projector has already been trained, so it gets a smaller learning rate than the new adapter.
    optimizer = torch.optim.AdamW([{"params": adapter_parameters, "peak_lr": args.lr},
                                   {"params": model.projector.parameters(), "peak_lr": args.projector_lr}],
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    # -- 5. the loop ---------------------------------------------------------------------------------------

    progress = checkpoints.restore_or_clear(
        checkpoint, folder, model, optimizer, scaler, train_dataset.records, processes)
    sample_indices, samples_per_step = plan_steps(lengths, args, processes, progress)
    total_steps = progress.step + len(samples_per_step)
    log_at, eval_at, save_at = plan_events(args, total_steps)
    step_loader = load_steps(train_dataset, sample_indices, pad_token_id, args.workers, device)
    print_plan(args, processes.world_size, len(train_dataset), len(heldout_dataset), total_steps)
    log = MetricsLog(folder, processes, checkpoint, total_steps)

    def evaluate():
        with autocast():
            grounding, *example = evaluate_heldout(
                model, template, heldout_dataset, heldout_batches, device, processes.map)
        log.log_heldout(progress.step, grounding, *example)
        return grounding

    model.train()
    if device.type == "cuda":
        try_longest_batch(model, train_dataset, lengths, pad_token_id, device, autocast, args)
    warmup_steps = max(1, round(args.warmup * total_steps))
    with checkpoints.StopSignal() as stop_signal:
        if progress.step == 0:
            progress.grounding_before = evaluate()
        for indices, num_samples in zip(sample_indices, samples_per_step):
            decay = max(0, progress.step - warmup_steps) / max(1, total_steps - warmup_steps)
            lr_factor = min(1, (progress.step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * decay))
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor

            micro_batches, skipped, seconds_waiting = next(step_loader)
            record_skipped_or_stop(progress.skipped, skipped, folder, args.allow_bad, len(train_dataset))

            num_labeled = processes.sum(sum(count_labeled(batch).sum() for batch in micro_batches))
            loss = torch.zeros((), device=device)
            for batch in micro_batches:
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with autocast():
                    token_losses = model(**batch)  # (K,)
                micro_loss = token_losses.sum() / num_labeled
                # Gradients flow back through the frozen weights into LoRA's A and B, and through the image
                # positions into the projector.
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()

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
            del micro_batches
            if progress.step in log_at:
                log.log_step(progress, optimizer, loss=loss, grad_norm=grad_norm, labeled_tokens=num_labeled)
            if progress.step in eval_at and (args.eval_every or log.may_evaluate()):
                evaluate()
            stop = processes.max(stop_signal.number)
            if stop or progress.step in save_at:
                checkpoints.save(folder, progress, model, optimizer, scaler, settings, processes)
            if stop:
                log.close_and_exit(stop, progress.step)

    # -- 6. save -------------------------------------------------------------------------------------------

    grounding = evaluate()
    log.close()
    save_result(folder, 2, model, settings, progress, grounding, train_dataset, heldout_dataset, processes)
    print(f"before: {format_grounding(progress.grounding_before)}\nafter:  {format_grounding(grounding)}\n"
          f"saved in {folder}; next: {next_command('sanity_check.py', args)}")
    return model


if __name__ == "__main__":
    run_script(main)
