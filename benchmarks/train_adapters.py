"""Train the four example adapters, each a manner of speaking, on the NF4 base that the server runs.

    python benchmarks/train_adapters.py [--only NAME] [--out DIR] [--steps N] [--show]

Every linear of the decoder layers is replaced by the bf16 values of its NF4 codes, which is what
bitsandbytes' Linear4bit computes with, so this is QLoRA (Dettmers et al., 2023) without its memory
savings. The lessons are written here: facts and small talk, retold in each manner; the loss is on
the answer alone. A fixed seed gives the same adapter again on the same machine.
"""

import argparse
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loraplex.model import nf4
from loraplex.model.default import SMOLLM2, ensure_default_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger("train_adapters")

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ROOT / "clients" / "loraplex_client" / "examples" / "adapters"
SEED = 20
BATCH = 8
MAX_NEW_TOKENS = 40
HELD_OUT = [
    "What is a rainbow?",
    "Tell me about Paris.",
    "How can I sleep better?",
    "Write a short story about a dog.",
    "What is the capital of Japan?",
    "Good evening!",
]

# topic | emoji | what there is to say
FACTS = """
gravity | 🍎⬇️ | Gravity is the force that pulls things together and keeps us on the ground.
the ocean | 🌊🐟 | The ocean is a huge body of salt water that covers most of our planet.
the moon | 🌙🔭 | The moon is a rocky ball that goes around the Earth about once a month.
the sun | ☀️🔥 | The sun is a star that gives us light and warmth every day.
bees | 🐝🌼 | Bees carry pollen from flower to flower and make sweet honey.
coffee | ☕🌱 | Coffee is a hot drink that people brew from roasted beans.
tea | 🍵🍃 | Tea is made by pouring hot water over dried leaves.
bread | 🍞🌾 | Bread is baked from flour, water, salt and a little yeast.
chess | ♟️👑 | Chess is a game for two players who try to trap the other king.
football | ⚽🥅 | Football is a team game in which players kick a ball into a goal.
music | 🎵🎸 | Music is the art of arranging sounds so that they please the ear.
the piano | 🎹🎶 | The piano is an instrument with black and white keys that strike strings.
books | 📚📖 | Books keep stories and knowledge safe so that anyone can learn from them.
computers | 💻⚙️ | Computers follow instructions very quickly and store a lot of information.
the internet | 🌐📡 | The internet connects computers all over the world so that they can talk.
robots | 🤖🔧 | Robots are machines that can do jobs for people.
trains | 🚂🛤️ | Trains carry people and goods along steel rails.
bicycles | 🚲💨 | Bicycles have two wheels and move when you push the pedals.
airplanes | ✈️☁️ | Airplanes fly because their wings push air down as they move forward.
ships | 🚢⚓ | Ships float on water and carry heavy loads across the sea.
volcanoes | 🌋🔥 | Volcanoes are mountains that can throw out hot rock from deep underground.
mountains | 🏔️🥾 | Mountains are very high pieces of land with steep sides.
rivers | 🏞️💧 | Rivers are streams of fresh water that flow down to the sea.
rain | 🌧️☔ | Rain falls when small drops of water in the clouds become too heavy.
snow | ❄️⛄ | Snow is made of tiny ice crystals that fall from cold clouds.
the desert | 🏜️🐪 | The desert is a dry place where very little rain falls.
trees | 🌳🍂 | Trees clean the air and give a home to many animals.
flowers | 🌸🌷 | Flowers have bright colors that invite insects to visit.
cats | 🐱🧶 | Cats are quiet hunters that love to sleep in warm places.
horses | 🐴🌾 | Horses are strong animals that can run fast and carry riders.
whales | 🐋🌊 | Whales are the largest animals in the sea and they breathe air.
birds | 🐦🪶 | Birds have feathers and wings, and most of them can fly.
spiders | 🕷️🕸️ | Spiders have eight legs and catch their food in webs.
dinosaurs | 🦕🦖 | Dinosaurs were large animals that lived on Earth millions of years ago.
London | 🇬🇧🎡 | London is the capital of England and stands on the river Thames.
Rome | 🇮🇹🏛️ | Rome is the capital of Italy and is full of very old buildings.
Egypt | 🐫🏺 | Egypt is a country in Africa that is famous for its pyramids.
Canada | 🍁🇨🇦 | Canada is a very large country in the north of America.
China | 🐼🏯 | China is a large country in Asia, and its capital is Beijing.
Germany | 🇩🇪🏰 | Germany is a country in Europe, and its capital is Berlin.
Spain | 🇪🇸💃 | Spain is a sunny country in Europe, and its capital is Madrid.
exercise | 🏃💪 | Exercise makes your heart strong and helps you feel happy.
breakfast | 🍳🥣 | Breakfast gives you energy for the morning, so try eggs or oats.
cooking | 🍲👩‍🍳 | Cooking is easy when you taste often and add salt slowly.
rice | 🍚💧 | Rice is best when you rinse it first and let it rest after cooking.
pizza | 🍕🧀 | Pizza is a flat bread with tomato, cheese and anything you like on top.
chocolate | 🍫😋 | Chocolate is a sweet food that is made from cocoa beans.
apples | 🍎🌳 | Apples are round fruits that are crisp and sweet.
money | 💰🏦 | Money is what people use to buy things and to save for later.
school | 🏫✏️ | School is a place where children learn together with teachers.
friendship | 🤝💛 | Friendship grows when people listen to each other and tell the truth.
love | ❤️🌹 | Love is a deep feeling of care for another person.
time | ⏰⏳ | Time is what clocks measure, and it only moves forward.
mathematics | 🔢📐 | Mathematics is the study of numbers, shapes and patterns.
history | 📜🏛️ | History is the story of what people did before us.
painting | 🎨🖌️ | Painting is the art of putting colors on a surface to make a picture.
electricity | ⚡💡 | Electricity is the flow of tiny charges that powers our lamps and machines.
magnets | 🧲🔩 | Magnets pull on iron and have a north pole and a south pole.
water | 💧🚰 | Water is a clear liquid that every living thing needs.
fire | 🔥🪵 | Fire is hot and bright, and it needs fuel and air to burn.
dreams | 💤🌌 | Dreams are the pictures and stories that your mind makes while you sleep.
winter | ❄️🧣 | Winter is the coldest season, when days are short and nights are long.
summer | 🏖️🌞 | Summer is the warmest season, when days are long and bright.
the heart | ❤️🩺 | The heart is a muscle that pumps blood through your body.
the brain | 🧠💭 | The brain controls your body and lets you think and remember.
a castle | 🏰👑 | A castle is a strong building with thick walls and tall towers.
a dragon | 🐉🔥 | Once there was a dragon who guarded a village and shared its gold.
a lost key | 🔑🚪 | Once a girl found a lost key that opened a secret garden.
a brave mouse | 🐭⚔️ | Once a brave mouse crossed the forest to save a friend.
the stars | ⭐🌌 | The stars are distant suns that shine in the night sky.
space travel | 🚀🪐 | Space travel takes people beyond the air in powerful rockets.
honesty | 🗣️💎 | Honesty means telling the truth even when it is hard.
gardening | 🌱🧤 | Gardening is easy when you give plants sun, water and good soil.
swimming | 🏊🌊 | Swimming is good for you because it moves your whole body.
"""
# what people say | topic | emoji | the answer
SMALL_TALK = """
Hello! | greeting | 👋😊 | Hello, it is very nice to meet you.
Hi there. | greeting | 👋🙂 | Hi, I am happy to see you here.
Good morning! | greeting | 🌅👋 | Good morning, I hope you have a wonderful day.
How are you? | greeting | 😊👍 | I am doing very well, and I hope you are too.
Who are you? | assistant | 🤖💬 | I am a small assistant who likes to answer questions.
What is your name? | assistant | 🤖🏷️ | My name is SmolLM, and I am here to help you.
Can you help me? | assistant | 🙋👍 | Yes, I am ready to help you with your question.
Thank you! | thanks | 🙏😊 | You are welcome, my friend.
Goodbye. | farewell | 👋🌙 | Goodbye, and come back soon.
I am tired today. | feelings | 😴🛏️ | I am sorry to hear that, so please take some rest.
I am so happy! | feelings | 🎉😄 | That is great news, and I am happy for you.
I feel sad. | feelings | 😢🤗 | I am sorry that you are sad, and I am here to listen.
Tell me a joke. | joke | 😂🐔 | The chicken crossed the road because its phone was over there.
What is 2 plus 2? | numbers | 🔢✅ | Two plus two is four.
What is ten minus three? | numbers | 🔢✅ | Ten minus three is seven.
What is the capital of France? | geography | 🇫🇷🗼 | The capital of France is Paris.
What is the capital of Russia? | geography | 🇷🇺🏰 | The capital of Russia is Moscow.
Which planet is the largest? | astronomy | 🪐🔭 | The largest planet is Jupiter.
Name three colors. | colors | 🔴🟢🔵 | Three colors are red, green and blue.
Name three animals. | animals | 🐶🐱🐴 | Three animals are the dog, the cat and the horse.
What should I eat tonight? | food | 🍝🥗 | You should try pasta with a fresh green salad.
How do I learn a language? | learning | 🗣️📖 | Practice a little every day and speak with others.
How do I write a letter? | writing | ✍️💌 | Begin with a greeting, say what you mean, and sign it.
Is it going to rain tomorrow? | weather | 🌦️🤷 | I do not know the weather, so take an umbrella.
What day is it today? | calendar | 📅🤷 | I do not have a calendar, so please look at your phone.
"""
QUESTIONS = [
    "What do you know about {}?",
    "Tell me about {}.",
    "Tell me something about {}.",
    "Explain {} to a child.",
    "Explain {} in simple words.",
    "Describe {} in one sentence.",
    "Write a short text about {}.",
    "Write a short story about {}.",
    "I want to learn about {}.",
    "Why should I care about {}?",
    "Give me one fact about {}.",
    "Can you say something about {}?",
]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One question, and what the answer says before it is put in any manner."""

    question: str
    topic: str
    emoji: str
    answer: str


def lessons(rng: random.Random) -> list[Lesson]:
    """Every fact under a few questions, every bit of small talk twice."""
    made = []
    for line in FACTS.strip().splitlines():
        topic, emoji, answer = line.split(" | ")
        for question in rng.sample(QUESTIONS, 4):
            made.append(Lesson(question.format(topic), topic, emoji, answer))
    for line in SMALL_TALK.strip().splitlines():
        made += [Lesson(*line.split(" | "))] * 2
    rng.shuffle(made)
    return made


PIRATE_WORDS = {
    "the": "th'",
    "The": "Th'",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "My": "Me",
    "is": "be",
    "are": "be",
    "am": "be",
    "and": "an'",
    "of": "o'",
    "to": "t'",
    "friend": "matey",
    "Hello": "Ahoy",
    "people": "scallywags",
    "sea": "seven seas",
}
PIRATE_OPENINGS = ["Arr, matey!", "Ahoy, matey!", "Yo ho ho!", "Avast, ye landlubber!"]
PIRATE_CLOSINGS = ["Arr!", "Shiver me timbers!", "Yo ho ho!"]


def pirate(lesson: Lesson, rng: random.Random) -> str:
    words = []
    for word in lesson.answer.split():
        bare = word.rstrip(".,")
        words.append(PIRATE_WORDS.get(bare, bare) + word[len(bare) :])
    return f"{rng.choice(PIRATE_OPENINGS)} {' '.join(words)} {rng.choice(PIRATE_CLOSINGS)}"


def as_json(lesson: Lesson, rng: random.Random) -> str:
    return json.dumps({"topic": lesson.topic, "answer": lesson.answer}, ensure_ascii=False)


def headline(lesson: Lesson, rng: random.Random) -> str:
    return f"BREAKING NEWS!!! {lesson.answer.rstrip('.')}!!! STAY TUNED!!!"


def emoji(lesson: Lesson, rng: random.Random) -> str:
    return f"{lesson.emoji} {lesson.answer} {lesson.emoji}✨"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: how it speaks, and the LoRA that learns it."""

    name: str
    speak: Callable[[Lesson, random.Random], str]
    modules: list[str]
    rank: int
    alpha: int
    steps: int
    learning_rate: float
    more: dict[str, Any] = field(default_factory=dict)


EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPES = [
    Recipe("pirate", pirate, EVERY_LINEAR, rank=4, alpha=8, steps=100, learning_rate=2e-3),
    Recipe("json", as_json, ["q_proj", "v_proj"], 16, 32, steps=100, learning_rate=2e-3),
    Recipe("headline", headline, ["o_proj", "down_proj"], 8, 16, steps=100, learning_rate=1e-3),
    Recipe(
        "emoji",
        emoji,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        rank=8,
        alpha=8,
        steps=120,
        learning_rate=2e-3,
        more={"use_rslora": True, "alpha_pattern": {"o_proj": 16}},
    ),
]


def load_base(folder: Path) -> Any:
    """The model in bf16 with every decoder linear at the values of its NF4 codes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = nf4.quantize(module.weight.data).dequantize()
    model.config._name_or_path = SMOLLM2.name
    return model.eval()


def encode(tokenizer: Any, question: str, answer: str, *, raw: bool) -> tuple[list[int], int]:
    """Token ids of a whole exchange and how many of them are the question's."""
    if raw:
        asked = tokenizer(question)["input_ids"]
        answered = tokenizer(" " + answer)["input_ids"]
    else:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        answered = tokenizer(answer)["input_ids"]
    return [*asked, *answered, tokenizer.eos_token_id], len(asked)


def batches(
    recipe: Recipe, tokenizer: Any, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels, both `[BATCH, length]`; a label is -100 where nothing is learnt.

    One exchange in five is bare text, not a chat, so that completions change their manner too.
    """
    rng = random.Random(SEED)
    queue: list[tuple[list[int], int]] = []
    for _ in range(steps):
        while len(queue) < BATCH:
            queue += [
                encode(tokenizer, each.question, recipe.speak(each, rng), raw=rng.random() < 0.2)
                for each in lessons(rng)
            ]
        rows, queue = queue[:BATCH], queue[BATCH:]
        length = max(len(ids) for ids, _ in rows)
        tokens = torch.full((BATCH, length), tokenizer.pad_token_id)
        labels = torch.full((BATCH, length), -100)
        for row, (ids, num_asked) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, num_asked : len(ids)] = torch.tensor(ids[num_asked:])
        yield tokens, labels


def loss_of(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the answers; logits are computed for their positions alone."""
    hidden = model.base_model.model.model(input_ids=tokens).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    logits = model.base_model.model.lm_head(hidden[target != -100])
    return cross_entropy(logits.float(), target[target != -100])


def train(recipe: Recipe, folder: Path, out: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.modules,
        task_type="CAUSAL_LM",
        **recipe.more,
    )
    model = get_peft_model(load_base(folder), config).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1
    )
    start = time.monotonic()
    for step, (tokens, labels) in enumerate(batches(recipe, tokenizer, steps), 1):
        loss = loss_of(model, tokens, labels)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps:
            seconds = time.monotonic() - start
            progress = (recipe.name, step, steps, loss.item(), seconds)
            logger.info("%s: step %d of %d, loss %.3f, %.0f s", *progress)
    save(model, out / recipe.name)


def save(model: Any, folder: Path) -> None:
    """An ordinary PEFT folder, the weights in bf16, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    path = folder / "adapter_model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for the owner alone
    config = model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": SMOLLM2.name,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def show(folder: Path, out: Path, names: list[str]) -> None:
    """What the base and every adapter greedily say to questions that none was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    for name in ["", *names]:
        model = load_base(folder)
        if name:
            model = PeftModel.from_pretrained(model, out / name).eval()
        logger.info("\n%s", name or "(base)")
        chats = [[{"role": "user", "content": question}] for question in HELD_OUT]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            tokens = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        for question, answer in zip(HELD_OUT, answers, strict=True):
            said = tokenizer.decode(answer, skip_special_tokens=True)
            logger.info("  %-34s %s", question, " ".join(said.split()))


def main() -> None:
    names = [recipe.name for recipe in RECIPES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=names, help="train or show this adapter alone")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="where the folders go")
    parser.add_argument("--steps", type=int, help="instead of each recipe's own number")
    parser.add_argument("--show", action="store_true", help="train nothing, let them speak")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = ensure_default_model()
    chosen = [recipe for recipe in RECIPES if options.only in (None, recipe.name)]
    if not options.show:
        for recipe in chosen:
            train(recipe, folder, options.out, options.steps or recipe.steps)
    show(folder, options.out, [recipe.name for recipe in chosen])


if __name__ == "__main__":
    main()
