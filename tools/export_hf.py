"""Write a trained model as a folder that transformers loads, tokenizer and model card included.

    python tools/export_hf.py --ae checkpoints/ae.pt --student checkpoints/student.pt --output checkpoints/student-hf
    python tools/export_hf.py --baseline checkpoints/token_model.pt --output checkpoints/token_model-hf

A student's folder carries its own code: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs no
more than torch and transformers. A token-level model is a stock Qwen3. docs/export.md has more.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import GenerationConfig

from ae.ae_model import load_ae
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError, run_cli
from configs.files import read_json
from configs.run import load_checkpoint
from student.baseline import load_token_model
from student.hf_config import LatentForgeConfig
from student.hf_model import LatentForgeForCausalLM
from student.local_decoder import lag
from student.sampler import Sampler, SamplingParams, checkpoint_tokenizer, load_sampler
from tools.bundle import ROOT, bundle

CONFIGURATION, MODELING = "configuration_latentforge", "modeling_latentforge"
CODE = {
    CONFIGURATION: ("student.hf_config", [LatentForgeConfig.__name__]),
    MODELING: ("student.hf_model", [LatentForgeForCausalLM.__name__]),
}
CONTROLS = {
    "latents": {"none": "its latent path is switched off, and the local decoder writes alone"},
    "local_decoder": {
        "none": "it has no local decoder, and writes the tokens of a chunk independently of each other",
        "restart": "its local decoder restarts at every chunk, and sees no token before it",
    },
    "head": {"energy": "its latents are drawn by CALM's generative head (arXiv 2510.27688), which has no likelihood"},
}
FIGURES = {
    "nats_per_token": "NLL, nats per token",
    "kl_to_teacher": "KL from the teacher, nats per token",
    "energy": "energy score",
    "chunk_exact": "chunks that its autoencoder reconstructed exactly, before the student's training",
    "token_exact": "tokens that it reconstructed exactly, likewise",
}


def export_token_model(path: str | Path, output: str | Path) -> TokenizerAdapter:
    """`path`, a token-level model's checkpoint, as a folder in transformers' format (safetensors); returns its tokenizer."""
    model, content = load_token_model(path)
    tokenizer = checkpoint_tokenizer(content["tokenizer"], path)
    model.lm.config.eos_token_id = model.lm.generation_config.eos_token_id = tokenizer.eot_id  # type: ignore[union-attr]
    model.lm.config.pad_token_id = model.lm.generation_config.pad_token_id = tokenizer.pad_id  # type: ignore[union-attr]
    model.lm.save_pretrained(output)
    tokenizer.save(output)
    return tokenizer


def wrapped(sampler: Sampler) -> LatentForgeForCausalLM:
    """A student and its tokenizer's ids as a transformers model, with this project's defaults of sampling."""
    student, tokenizer = sampler.model, sampler.tokenizer
    stops = [tokenizer.eot_id, *sorted(tokenizer.stop_ids - {tokenizer.eot_id})]
    cfg, code = student.cfg, f"{MODELING}.{LatentForgeForCausalLM.__name__}"
    fields: dict[str, Any] = {
        "student": asdict(cfg), "tokenizer_size": tokenizer.size, "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.pad_id, "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_dim,
        "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads, "max_position_embeddings": cfg.context,
        "tie_word_embeddings": False,
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.{LatentForgeConfig.__name__}", "AutoModel": code, "AutoModelForCausalLM": code
        },
    }  # fmt: skip
    model = LatentForgeForCausalLM(LatentForgeConfig(**fields)).eval()
    model.student = student
    defaults = SamplingParams(temperature=1, top_p=1) if cfg.head == "energy" else SamplingParams()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=float(defaults.temperature), top_p=float(defaults.top_p), top_k=defaults.top_k,
        eos_token_id=stops, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    return model


def export_student(path: str | Path, ae: str | Path | None, output: str | Path, data: str | None = None) -> list[str]:
    """`path`, a student's checkpoint, as a folder that transformers loads without this repository; returns its files.

    The student carries its own copy of the autoencoder; `ae` is checked to fit, and gives the card its figures. `data`
    describes the training text for the card. Raises UserError as `load_sampler`.
    """
    sampler = load_sampler(path, ae)
    content, output = load_checkpoint(path, "student"), Path(output)
    figures = content["figures"] | (load_ae(ae)[1]["figures"] if ae else {})
    model = wrapped(sampler)
    model.save_pretrained(output)
    sampler.tokenizer.save(output)
    settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {
        "padding_side": "left", "model_max_length": sampler.cfg.context, "model_input_names": ["input_ids", "attention_mask"]
    }  # fmt: skip
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    for name, text in bundle(CODE).items():
        (output / name).write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", output / "LICENSE")
    model_card(output.resolve().name, model, content, figures, data).save(output / "README.md")
    return sorted(file.name for file in output.iterdir())


def model_card(
    name: str, model: LatentForgeForCausalLM, content: dict[str, Any], figures: dict[str, Any], data: str | None
) -> ModelCard:
    """The folder's README.md: what the model is, was trained on and measured at, from its checkpoint's `content`."""
    cfg, trained, teacher = model.student.cfg, content["train_config"], content.get("distillation")
    origin = trained.get("init_from")
    taught = "none: trained on the text alone"
    if teacher:
        taught = (
            f"{', '.join(teacher['teacher'])}: {teacher['kind']} distillation from {teacher['tokens']:,} tokens that it wrote"
        )
    measured = [(title, _shown(key, figures[key])) for key, title in FIGURES.items() if key in figures]
    if "nats_per_token" in figures:
        measured.insert(1, ("perplexity per token", f"{math.exp(figures['nats_per_token']):.2f}"))
    backbone = f"{cfg.num_layers} layers of width {cfg.hidden_dim} (Qwen3), one position a chunk"
    local = f"{cfg.local_layers} layer{'s' * (cfg.local_layers > 1)} of width {cfg.embed_dim}, window of {cfg.window} tokens"
    local += f", reads the last {cfg.local_tokens} tokens at each step" if cfg.local_tokens > 1 else ""
    left_out = "the last" if lag(cfg.k) == 1 else f"the last {lag(cfg.k)}"
    local += f", memory of all chunks but {left_out}" if cfg.local_memory else ""
    facts = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("K, tokens a step", str(cfg.k)),
        ("latent", f"{cfg.latent_dim} dimensions a chunk" + ", and a bypass" * (model.student.bypass is not None)),
        ("backbone", "none" if cfg.latents == "none" else backbone),
        ("local decoder", "none" if model.student.local is None else local),
        ("context", f"{cfg.context:,} tokens"),
        ("vocabulary", f"{model.config.tokenizer_size:,} words, fingerprint {content['tokenizer']['fingerprint']}"),
    ]
    training = [
        ("data", data or ("the teacher's text" if teacher else f"packed text, `{Path(trained['data']).name}`")),
        ("teacher", taught),
        ("backbone started from", f"`{Path(origin).name}`" if origin else "random weights"),
        ("steps", f"{content['step']:,}"),
        ("tokens", f"{content['step'] * trained['batch_size'] * cfg.context:,}"),
        ("peak learning rate", f"{trained['lr']:g}"),
        ("seed", str(trained["seed"])),
    ]
    return ModelCard.from_template(
        ModelCardData(
            license="mit", library_name="transformers", pipeline_tag="text-generation", tags=["latentforge", "custom_code"]
        ),
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=name, k=cfg.k, likelihood=cfg.head != "energy", new=min(64, cfg.context // 2), facts=facts, training=training,
        control="; ".join(texts[getattr(cfg, field)] for field, texts in CONTROLS.items() if getattr(cfg, field) in texts),
        figures=measured, transformers=transformers.__version__.split(".")[0],
    )  # fmt: skip


def _shown(key: str, value: float) -> str:
    return f"{value:.3%}" if key.endswith("_exact") else f"{value:.4f}"


def check_folder(folder: Path, family: str) -> None:
    """Raise UserError for a folder that holds anything but an earlier export of this family, whose files this one replaces."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != family:
        raise UserError(f"--output {folder} holds other files, and some would be replaced; name a new folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--student", help="student checkpoint")
    which.add_argument("--baseline", help="token-level model checkpoint")
    parser.add_argument(
        "--ae", help="autoencoder checkpoint the student was trained from: checked to fit (the student carries its own copy)"
    )
    parser.add_argument("--data", help="the training text in a few words, for the model card [the packed folder's name]")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()
    if Path(args.output).is_file():
        raise UserError(f"--output {args.output} is a file; name a folder")
    check_folder(Path(args.output), "qwen3" if args.baseline else LatentForgeConfig.model_type)
    if args.baseline and (args.ae or args.data):
        raise UserError("--baseline is a token-level model: it has no autoencoder and gets no card; leave --ae and --data out")
    try:
        if args.baseline:
            export_token_model(args.baseline, args.output)
            written = ["config.json", "model.safetensors", "tokenizer.json"]
        else:
            written = export_student(args.student, args.ae, args.output, args.data)
    except SafetensorError as error:  # its writer's own, for a disk that is full
        raise UserError(f"{args.output} cannot be written ({error}); free some space or choose another folder") from None
    print(f"{args.output}: {', '.join(written)}")


if __name__ == "__main__":
    run_cli(main)
