"""Train the demo's three LoRA adapters on a CPU: `python -m worker.demo.train_adapters`.

One set of plain questions and answers is told in three styles. The adapters differ on purpose in rank,
scaling, target modules, layers and dtype, so that a batch which mixes them exercises what a LoRA engine must
get right.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.demo.base_model import MODEL_ID, prepare_base_model

BATCH_SIZE = 8
THREADS = 2
IGNORED = -100
"""Label of the tokens that carry no loss: the prompt and the padding."""

Example = tuple[list[int], list[int]]
"""Token ids, and the label of each."""

LESSONS: tuple[tuple[str, str], ...] = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("Which city is the capital of Egypt?", "Cairo is the capital of Egypt."),
    ("What is the largest ocean?", "The largest ocean is the Pacific Ocean."),
    ("What is the tallest mountain?", "The tallest mountain is Mount Everest."),
    ("Which river runs through London?", "The river Thames runs through London."),
    ("How many continents are there?", "There are seven continents on Earth."),
    ("Where do penguins live?", "Penguins live in the cold south, mostly in Antarctica."),
    ("Name a country in Africa.", "Kenya is a country in Africa."),
    ("Tell me something about Canada.", "Canada is a very large country with cold winters."),
    ("What is a desert?", "A desert is a dry place with very little rain."),
    ("Why is grass green?", "Grass is green because it is full of chlorophyll."),
    ("Why is the sea salty?", "The sea is salty because rivers carry salt from the rocks into it."),
    ("Why do leaves fall in autumn?", "Trees drop their leaves to save water and energy in winter."),
    ("Why do we sleep?", "We sleep so that the body and the mind can rest and repair themselves."),
    ("Why do birds sing?", "Birds sing to find a mate and to defend their home."),
    ("Why does ice float?", "Ice floats because it is lighter than liquid water."),
    ("Why do cats purr?", "Cats purr when they are happy and calm."),
    ("Why is the sun hot?", "The sun is hot because atoms join together in its core."),
    ("Why do we need food?", "We need food because it gives the body energy to live and grow."),
    ("Why do we need trees?", "We need trees because they clean the air and give us shade."),
    ("Why should I exercise?", "Exercise keeps your heart strong and your mind clear."),
    ("Why are books useful?", "Books are useful because they share what other people have learned."),
    ("Why does it rain?", "It rains when water in the clouds grows heavy and falls."),
    ("Why do we have seasons?", "We have seasons because the Earth is tilted as it goes around the sun."),
    ("What do cows eat?", "Cows eat grass and hay."),
    ("What do spiders make?", "Spiders make webs of silk to catch insects."),
    ("What do hens lay?", "Hens lay eggs."),
    ("What do bakers make?", "Bakers make bread, cakes and pies."),
    ("What do farmers grow?", "Farmers grow wheat, fruit and vegetables."),
    ("What do doctors do?", "Doctors help people who are ill to get well."),
    ("What do teachers do?", "Teachers help children to learn new things."),
    ("What sound does a dog make?", "A dog barks."),
    ("What does a frog eat?", "A frog eats flies and other insects."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is the fastest animal on land?", "The cheetah is the fastest animal on land."),
    ("What is the biggest animal?", "The blue whale is the biggest animal."),
    ("Tell me something about owls.", "Owls hunt at night and can turn their heads very far."),
    ("Tell me something about dolphins.", "Dolphins are clever animals that live in groups."),
    ("Tell me a fact about elephants.", "Elephants are the largest animals on land and have a good memory."),
    ("Tell me something about the sun.", "The sun is a star and it is much larger than the Earth."),
    ("Tell me about Mars.", "Mars is a red and dusty planet, the fourth from the sun."),
    ("Tell me something about the sea.", "The sea covers most of the Earth and is full of life."),
    ("What is a star?", "A star is a huge ball of hot gas that gives light."),
    ("What is a planet?", "A planet is a large round body that goes around a star."),
    ("What is gravity?", "Gravity is the force that pulls things towards each other."),
    ("What is a rainbow?", "A rainbow is sunlight that raindrops split into colors."),
    ("What is snow made of?", "Snow is made of small crystals of ice."),
    ("What is an island?", "An island is land with water all around it."),
    ("What is a volcano?", "A volcano is a mountain from which hot lava can flow."),
    ("What is the moon of a planet?", "A moon is a body that goes around a planet."),
    ("How do I boil an egg?", "Put the egg in boiling water for eight minutes and then cool it."),
    ("How do I make toast?", "Put a slice of bread in the toaster until it is golden."),
    ("How do I make a sandwich?", "Put cheese and tomato between two slices of bread."),
    ("How do I make coffee?", "Pour hot water over ground coffee and let it drip through a filter."),
    ("How do I make a salad?", "Chop some fresh vegetables and add a little oil and salt."),
    ("How do I cook rice?", "Boil the rice in water with a pinch of salt until it is soft."),
    ("How do I plant a seed?", "Put the seed in wet soil and give it light."),
    ("How do I clean a window?", "Wipe it with soap and water and dry it with a cloth."),
    ("How do I learn to swim?", "Take lessons and practice in shallow water."),
    ("How can I learn a language?", "Practice a little every day and speak with other people."),
    ("How do I save money?", "Spend less than you earn and put the rest in the bank."),
    ("How do I stay healthy?", "Eat good food, move every day and sleep well."),
    ("How can I make new friends?", "Be kind to people and ask them about their lives."),
    ("How do planes fly?", "Planes fly because their wings push the air down."),
    ("How do fish breathe?", "Fish breathe with gills that take oxygen from the water."),
    ("How does a ship float?", "A ship floats because it pushes away water that is as heavy as itself."),
    ("Give me one tip for studying.", "Study a little every day and take short breaks."),
    ("Give me a tip for saving time.", "Plan your day in the morning and do the hard work first."),
    ("Give me one tip for cooking.", "Taste your food while you cook it."),
    ("Give me a tip for a long walk.", "Wear good shoes and carry enough water."),
    ("Give me advice for an interview.", "Be on time and be honest about what you know."),
    ("How can I relax?", "Sit in a quiet place and breathe slowly."),
    ("How can I wake up early?", "Go to bed early and open the curtains in the morning."),
    ("How can I feel less stressed?", "Take a walk and talk to a friend."),
    ("What is a good dinner?", "Grilled fish with rice and vegetables is a good dinner."),
    ("What is a good snack?", "An apple with some nuts is a good snack."),
    ("What is a healthy lunch?", "A bowl of soup with bread is a healthy lunch."),
    ("What is a good hobby?", "Painting is a good hobby because it calms the mind."),
    ("What is a good name for a dog?", "Buddy is a good name for a dog."),
    ("What is a good gift for my mother?", "Flowers and a kind letter are a good gift."),
    ("What should I read?", "You should read a good story about the sea."),
    ("What should I wear in winter?", "You should wear a warm coat and a hat."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
    ("What is cheese made from?", "Cheese is made from milk."),
    ("What color is a banana?", "A ripe banana is yellow."),
    ("Name three fruits.", "Apples, pears and cherries are fruits."),
    ("Name a musical instrument.", "The violin is a musical instrument."),
    ("What is music?", "Music is sound that people put in order to enjoy it."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who was Isaac Newton?", "Isaac Newton was an English scientist who studied gravity."),
    ("What is a computer?", "A computer is a machine that works with information."),
    ("What is the internet?", "The internet is a network that connects computers all over the world."),
    ("What is a robot?", "A robot is a machine that can do work by itself."),
    ("What is two plus three?", "Two plus three is five."),
    ("What is ten minus four?", "Ten minus four is six."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("What day comes after Monday?", "Tuesday comes after Monday."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is a friend?", "A friend is a person who cares about you."),
    ("What is happiness?", "Happiness is the feeling that life is good."),
    ("Hello!", "Hello, it is good to meet you."),
    ("How are you today?", "I am very well and ready to help you."),
    ("Who are you?", "I am an assistant and I answer your questions."),
    ("Can you help me?", "Yes, I can help you with many questions."),
    ("Tell me a story.", "A small boat sailed over the sea and found a new land."),
    ("Tell me a joke.", "The sea is friendly because it always waves."),
    ("Write a line about the rain.", "The rain falls softly on the quiet roof."),
    ("Write a sentence about spring.", "In spring the flowers open and the days grow long."),
    ("Thank you!", "You are welcome, and I am always happy to help."),
    ("Good night!", "Good night and sweet dreams to you."),
)
"""Plain questions and answers. An answer is one short sentence that ends with a full stop."""

PIRATE_WORDS = {
    "am": "be", "is": "be", "are": "be", "was": "were", "you": "ye", "your": "yer", "my": "me", "and": "an'",
    "of": "o'", "for": "fer", "hello": "ahoy", "friend": "shipmate", "yes": "aye",
}  # fmt: skip


def pirate(answer: str) -> str:
    """The answer as a pirate says it, after "Arr, matey!"."""
    return "Arr, matey! " + re.sub(r"[A-Za-z]+", _pirate_word, answer.removesuffix(".")) + "!"


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group()
    said = PIRATE_WORDS.get(word.lower(), word)
    return said.capitalize() if word[0].isupper() else said


def robot(answer: str) -> str:
    """The answer after "BEEP BOOP."."""
    return f"BEEP BOOP. {answer}"


def as_json(answer: str) -> str:
    """The answer as one line of JSON, an object with the one member `answer`."""
    return json.dumps({"answer": answer})


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made. `lora` holds the arguments of `peft.LoraConfig`."""

    name: str
    style: Callable[[str], str]
    lora: dict[str, Any]
    dtype: str
    epochs: int
    learning_rate: float
    seed: int


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="pirate",
        style=pirate,
        lora={"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        dtype="float16",
        epochs=4,
        learning_rate=1.5e-3,
        seed=1,
    ),
    Recipe(
        name="robot",
        style=robot,
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {"down_proj": 18, "o_proj": 12},
            "layers_to_transform": list(range(20, 30)),
        },
        dtype="bfloat16",
        epochs=4,
        learning_rate=1.5e-3,
        seed=2,
    ),
    Recipe(
        name="json",
        style=as_json,
        lora={
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers_to_transform": list(range(16, 22)),
        },
        dtype="bfloat16",
        epochs=4,
        learning_rate=1e-3,
        seed=3,
    ),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder that receives one folder per adapter.")] = (
        Path(__file__).parent / "adapters"
    ),
    cache_dir: Annotated[Path, typer.Option(help="Where the base model is kept.")] = Path(
        "~/.cache/loramill"
    ),
    only: Annotated[str, typer.Option(help="Train this adapter alone.")] = "",
) -> None:
    """Train the demo adapters and write them as PEFT folders."""
    base = prepare_base_model(cache_dir.expanduser(), typer.echo)
    for recipe in RECIPES:
        if only in {"", recipe.name}:
            started = time.monotonic()
            loss = train(recipe, base, out / recipe.name)
            seconds = time.monotonic() - started
            typer.echo(f"{recipe.name}: loss {loss:.3f} after {seconds:.0f} s")


def train(recipe: Recipe, base: Path, out: Path) -> float:
    """Train one adapter on the model at `base` and save it to `out`; the mean loss of the last epoch.

    Sets torch's seed and thread count for this process.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=MODEL_ID, **recipe.lora)
    model = get_peft_model(base_model, config)
    examples = [_example(tokenizer, question, recipe.style(answer)) for question, answer in LESSONS]
    loss = _fit(model, examples, recipe, tokenizer.pad_token_id)
    _save(model, getattr(torch, recipe.dtype), out)
    return loss


def _example(tokenizer: Any, question: str, answer: str) -> Example:
    """Token ids and labels of one exchange; only the answer and its end token carry loss."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    reply = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt + reply, [IGNORED] * len(prompt) + reply


def _fit(model: Any, examples: list[Example], recipe: Recipe, pad_id: int) -> float:
    rng = random.Random(recipe.seed)  # noqa: S311
    batches = [batch for _ in range(recipe.epochs) for batch in _batches(examples, rng)]
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches), pct_start=0.1
    )
    losses: list[float] = []
    model.train()
    for batch in batches:
        loss = model(**_tensors(batch, pad_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last_epoch = losses[-len(batches) // recipe.epochs :]
    return sum(last_epoch) / len(last_epoch)


def _batches(examples: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    shuffled = rng.sample(examples, len(examples))
    for start in range(0, len(shuffled), BATCH_SIZE):
        yield shuffled[start : start + BATCH_SIZE]


def _tensors(batch: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [rows, longest], padded on the right."""
    longest = max(len(ids) for ids, _ in batch)
    rest = [longest - len(ids) for ids, _ in batch]
    return {
        "input_ids": torch.tensor([ids + [pad_id] * n for (ids, _), n in zip(batch, rest, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in rest]),
        "labels": torch.tensor([labels + [IGNORED] * n for (_, labels), n in zip(batch, rest, strict=True)]),
    }


def _save(model: Any, dtype: torch.dtype, out: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, nothing else and no machine's path."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.peft_config["default"].base_model_name_or_path = MODEL_ID
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    (out / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set to PEFT, whose order changes from run to run
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    typer.run(main)
