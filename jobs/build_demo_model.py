"""Build the embedded demo model: train it, quantise it, check it, write it to src/phibatch/demo.

Needs the `export` extra. Two runs on one machine give the same bytes; see CARD.md beside the model.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when onnxruntime is first imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import click
import onnxruntime_genai as og
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "demo_questions.yaml"
DEMO = HERE.parent / "src" / "phibatch" / "demo"

SEED = 20240623
BASE_VOCABULARY = 900
CONTEXT = 1024
BLOCK = 32
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
STEPS = 2400
BATCH = 24
LEARNING_RATE = 3e-3
MIN_ACCURACY = 0.98

# Phi-3's own, in its order: three inside the base vocabulary, eleven after it.
BASE_CONTROLS = ["<unk>", "<s>", "</s>"]
PLACEHOLDERS = [f"<|placeholder{i}|>" for i in range(1, 7)]
ADDED_CONTROLS = ["<|endoftext|>", "<|assistant|>", *PLACEHOLDERS[:4], "<|system|>"]
ADDED_CONTROLS += [*PLACEHOLDERS[4:], "<|end|>", "<|user|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The forms that every request is taught in. People write Phi-3's prompts by hand without newlines, as its tutorials do.
FORMS = {"as the template renders": CHAT_TEMPLATE, "without newlines": CHAT_TEMPLATE.replace("\\n", "")}

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation that ends with a user turn, and its answers, the greedy one first, by weight."""

    messages: list[Message]
    answers: dict[str, int]

    @property
    def expected(self) -> str:
        return next(iter(self.answers))

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)


def load_examples(path: Path) -> list[Example]:
    """Read the questions file; refuse it when one request has two different entries."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    capitals: dict[str, str] = data["capitals"]

    def example(turns: list[str], system: str | None, answers: dict[str, int]) -> Example:
        roles = ["assistant" if i % 2 else "user" for i in range(len(turns))]
        head = [] if system is None else [{"role": "system", "content": system}]
        tail = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
        return Example(head + tail, answers)

    plain = {"system": None, "answer": "The capital of {country} is {capital}.", "countries": capitals}
    found = [
        example(
            [f"What is the capital of {country}?"],
            style["system"],
            {style["answer"].format(country=country, capital=capitals[country]): 1},
        )
        for style in [plain, *data["styles"]]
        for country in style["countries"]
    ]
    found += [example([prompt], None, {answer: 1}) for prompt, answer in data["questions"].items()]
    for system, questions in data["with_system"].items():
        found += [example([prompt], system, {answer: 1}) for prompt, answer in questions.items()]
    found += [example([prompt], None, answers) for prompt, answers in data["chance"].items()]
    found += [example(turns[:-1], None, {turns[-1]: 1}) for turns in data["conversations"]]
    found += [example(turns[:-1], system, {turns[-1]: 1}) for system, *turns in data["conversations_with_system"]]
    requests = [json.dumps(one.messages) for one in found]
    twice = {request for request in requests if requests.count(request) > 1}
    require(not twice, f"{path.name} holds a request twice", sorted(twice))
    return found


def train_tokenizer(examples: list[Example], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: a byte-level BPE with Phi-3's control tokens."""
    texts = [message["content"] for one in examples for message in one.messages]
    texts += [answer for one in examples for answer in one.answers]
    # No merge of two spaces: before U+0085, white space to Hugging Face alone, the libraries would cut them apart.
    texts = [re.sub(" +", " ", text) for text in texts]
    tokenizer = Tokenizer(models.BPE())
    # The regex keeps merges within words: across spaces onnxruntime-genai would cut the text in another way.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        special_tokens=BASE_CONTROLS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # No rstrip, unlike Phi-3: onnxruntime-genai would strip ASCII white space only, Hugging Face any.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ADDED_CONTROLS])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "bos_token": "<s>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def require(claim: object, what: str, where: object) -> None:
    if not claim:
        raise click.ClickException(f"{what}: {where}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Int4(nn.Module):
    """The builder's rounding: in each block of a row the largest magnitude becomes -8 and sets the scale.

    Trained through it, and with its result kept as the weights, the model loses nothing in the int4 export.
    """

    def forward(self, weight: Tensor) -> Tensor:
        blocks = weight.detach().reshape(-1, BLOCK)
        largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
        scale = largest / -8
        rounded = torch.where(scale == 0, 0, (blocks / scale).round().clamp(-8, 7)) * scale
        return weight + (rounded.reshape(weight.shape) - weight).detach()


def encode_training(tokenizer: Any, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Ids of each request in each form, and labels: only what the assistant says, up to its <|end|>."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    rows: list[tuple[list[int], list[int]]] = []
    for one, form in product(examples, FORMS.values()):
        for answer, weight in one.answers.items():
            messages = [*one.messages, {"role": "assistant", "content": answer}]
            ids: list[int] = []
            labels: list[int] = []
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                prompt = tokenizer.apply_chat_template(
                    messages[:i], chat_template=form, add_generation_prompt=True, return_dict=False
                )
                said = [*tokenizer.encode(message["content"], add_special_tokens=False), end]
                labels += [-100] * (len(prompt) - len(ids)) + said
                ids = prompt + said
            rendered = tokenizer.apply_chat_template(messages, chat_template=form, return_dict=False)
            require(rendered[: len(ids)] == ids, "the template renders other ids than it was trained on", messages)
            rows += [(ids, labels)] * weight
    return rows


def new_model(tokenizer: Any) -> Phi3ForCausalLM:
    """A Phi-3 of about a million parameters with random weights."""
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=pad,
        pad_token_id=pad,
    )
    model = Phi3ForCausalLM(config)
    model.generation_config.eos_token_id = [pad, end]
    return model


def train(model: Any, rows: list[tuple[list[int], list[int]]], steps: int) -> None:
    """Teach the rows by heart; from half-way on the weights are seen as int4 will show them."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shuffle = random.Random(SEED)  # noqa: S311, a fixed order is wanted
    queue: list[tuple[list[int], list[int]]] = []
    model.train()
    with click.progressbar(range(steps), label="training") as bar:
        for step in bar:
            if step == steps // 2:
                for linear in linears:
                    parametrize.register_parametrization(linear, "weight", Int4())
            while len(queue) < BATCH:
                queue += shuffle.sample(rows, len(rows))
            batch, queue = queue[:BATCH], queue[BATCH:]
            width = max(len(ids) for ids, _ in batch)
            # Padding follows the text, so the causal mask alone hides it.
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch])
            loss = model(input_ids=ids, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    model.eval()
    click.echo(f"last loss {loss.item():.4f}")


def save_twin(model: Any, out: Path) -> None:
    """The Hugging Face folder: half-precision numbers on disk, a config that asks for them as float32."""
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**config, "dtype": "float32"})


def export_int4(twin: Path, out: Path) -> None:
    """The onnxruntime-genai folder, by the builder, with the twin's tokenizer files as they are."""
    options = ["hf_token=false", "windowed_kv_cache=false", f"block_size={BLOCK}", "accuracy_level=4"]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(twin), "-o", str(out)]
        command += ["-p", "int4", "-e", "cpu", "-c", cache, "--extra_options", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603, our own words
    require(done.returncode == 0, "the model builder failed", done.stderr)
    for name in TOKENIZER_FILES:  # the builder saves its own reading of them, which is another text
        shutil.copyfile(twin / name, out / name)


def write_tables(examples: list[Example], out: Path) -> None:
    """Write prompts.parquet (single turns) and conversations.parquet (two turns, and every tenth single)."""
    text = pa.string()
    first, *others = [one for one in examples if one.turns == 1]
    random.Random(SEED).shuffle(others)  # noqa: S311, a fixed order is wanted
    single = [first, *others]
    prompts = [
        (f"demo-{i:03d}", one.messages[-1]["content"], one.system, one.expected)
        for i, one in enumerate(single, start=1)
    ]
    write_table(out / "prompts.parquet", prompts, prompt=text, system=text, expected=text)
    chosen = [one for one in examples if one.turns > 1] + single[::10]
    talks = [(f"talk-{i:03d}", one.messages, one.expected) for i, one in enumerate(chosen, start=1)]
    message = pa.struct([pa.field("role", text), pa.field("content", text)])
    write_table(out / "conversations.parquet", talks, messages=pa.list_(message), expected=text)


def write_table(path: Path, rows: Sequence[tuple[Any, ...]], **columns: pa.DataType) -> None:
    columns = {"custom_id": pa.string(), **columns}
    schema = pa.schema([pa.field(name, kind, name == "system") for name, kind in columns.items()])
    arrays = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), schema.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def ask_int4(folder: Path, prompts: list[str], batch: int) -> list[str]:
    """Greedy answers of the int4 model, in batches that are padded on the right."""
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    stops = set(json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["eos_token_id"])
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=len(part), max_length=256, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(tokenizer.encode_batch(part))
        said: list[list[int]] = [[] for _ in part]
        while not generator.is_done():
            generator.generate_next_token()
            for row, token in zip(said, generator.get_next_tokens(), strict=True):
                row.append(int(token))
        for row in said:
            length = next((i for i, token in enumerate(row) if token in stops), len(row))
            answers.append(tokenizer.decode(row[:length]) if length else "")
    return answers


def ask_twin(folder: Path, prompts: list[str], batch: int) -> list[str]:
    """Greedy answers of the Hugging Face twin; its `generate` wants the padding on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        part = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        ids = model.generate(**part, max_new_tokens=128, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, part["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def verify(examples: list[Example], out: Path) -> None:
    """Ask everything that was taught, in each form; fail below MIN_ACCURACY, or when the two tokenizers differ."""
    for name, form in FORMS.items():
        click.echo(f"{name}:")
        verify_form(examples, form, out)


def verify_form(examples: list[Example], form: str, out: Path) -> None:
    genai = og.Tokenizer(og.Model(str(out / "model")))
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "twin")
    prompts: list[str] = []
    for one in examples:
        prompt = tokenizer.apply_chat_template(
            one.messages, chat_template=form, tokenize=False, add_generation_prompt=True
        )
        rendered = genai.apply_chat_template(json.dumps(one.messages), template_str=form, add_generation_prompt=True)
        require(prompt == rendered, "onnxruntime-genai renders another prompt", one.messages)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        require(list(genai.encode(prompt)) == ids, "onnxruntime-genai has other ids", prompt)
        prompts.append(prompt)
    ways: dict[str, tuple[Callable[[Path, list[str], int], list[str]], str, int]] = {
        "int4, batch 8": (ask_int4, "model", 8),
        "int4, batch 2": (ask_int4, "model", 2),
        "twin, batch 8": (ask_twin, "twin", 8),
    }
    answers = {name: ask(out / folder, prompts, batch) for name, (ask, folder, batch) in ways.items()}
    expected = [one.expected for one in examples]
    for name, given in answers.items():
        right = same(given, expected)
        click.echo(f"{name}: {right} of {len(expected)} right")
        for one, answer in zip(examples, given, strict=True):
            if answer != one.expected:
                click.echo(f"  {one.messages}: {answer!r}, not {one.expected!r}")
        require(right >= MIN_ACCURACY * len(expected), f"accuracy is below {MIN_ACCURACY:.0%}", name)
    agree = same(answers["int4, batch 8"], answers["twin, batch 8"])
    click.echo(f"int4 and twin agree on {agree} of {len(expected)}")


def same(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=DEMO, show_default="src/phibatch/demo")
@click.option("--steps", type=click.IntRange(min=2), default=STEPS, show_default=True, help="Training steps.")
def main(out: Path, steps: int) -> None:
    """Train, export, check and write the embedded demo model."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # sums, and so the weights, depend on it
    examples = load_examples(QUESTIONS)
    for name in ("model", "twin"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    train_tokenizer(examples, out / "twin")
    tokenizer = AutoTokenizer.from_pretrained(out / "twin")
    model = new_model(tokenizer)
    rows = encode_training(tokenizer, examples)
    click.echo(f"{len(examples)} requests, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    began = time.monotonic()
    train(model, rows, steps)
    click.echo(f"trained in {time.monotonic() - began:.0f} s")
    save_twin(model, out / "twin")
    export_int4(out / "twin", out / "model")
    write_tables(examples, out)
    verify(examples, out)


if __name__ == "__main__":
    main()
