"""Made-up cases of long-range retrieval, from a seed: LongEval's lines and topics, and the passkey.

Lines and topics have the words of LongEval (Li et al. 2023, github.com/DachengLi1/LongChat, longeval/utils.py) with the
beginning of the answer after the question, as that code does for models without instruction tuning. The names of lines
are pairs out of two lists here, in place of those of the package wonderwords, and conversations are made of templates,
in place of the published ones, so numbers compare between models evaluated here and not with published scores. The
passkey is that of Mohtashami and Jaggi (arXiv 2305.16300).
"""

from __future__ import annotations

import dataclasses
import enum
import random

LARGEST_NUMBER = 50_000  # of lines' contents and passkeys, from 1 on


class Task(enum.StrEnum):
    """A kind of case."""

    LINES = "lines"
    TOPICS = "topics"
    PASSKEY = "passkey"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A text that ends where the answer begins, and the answer with what must follow it."""

    prompt: str
    answer: str
    depth: float  # where what is asked for stands among the items: 0 the first, 1 the last


def make_case(task: Task, *, num_items: int, depth: float, seed: int) -> Case:
    """Return a case of so many lines, topics or pieces of filler; equal arguments give equal cases.

    What is asked for is item round(depth * (num_items - 1)); of topics always the first, as in LongEval.
    """
    generator = random.Random(f"{task} {seed}")
    return _MAKERS[task](generator, num_items, depth)


def _lines(generator: random.Random, num_items: int, depth: float) -> Case:
    pairs = generator.sample(range(len(_ADJECTIVES) * len(_NOUNS)), num_items)
    names = [f"{_ADJECTIVES[pair // len(_NOUNS)]}-{_NOUNS[pair % len(_NOUNS)]}" for pair in pairs]
    contents = random.Random(generator.random())
    numbers = [contents.randint(1, LARGEST_NUMBER) for _ in range(num_items)]
    asked = round(depth * (num_items - 1))
    lines = [f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in zip(names, numbers, strict=True)]
    prompt = (
        f"{_LINES_HEADER}{''.join(lines)}\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line "
        f"{names[asked]}? I need the number.\nLine {names[asked]}: <REGISTER_CONTENT> is"
    )
    return Case(prompt=prompt, answer=f" <{numbers[asked]}>", depth=asked / max(num_items - 1, 1))


def _topics(generator: random.Random, num_items: int, depth: float) -> Case:
    del depth
    chosen = generator.sample([f"{aspect} {subject}" for aspect in _ASPECTS for subject in _SUBJECTS], num_items)
    conversations = [_conversation(random.Random(f"{generator.random()}"), topic) for topic in chosen]
    prompt = (
        f"Below is a record of our previous conversation on {num_items} different topics. You are the ASSISTANT, "
        "and I am the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of "
        "<TOPIC>'. Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now "
        f"the record start. {''.join(conversations)} Now the record ends. What is the first topic(s) we discussed? "
        "Only give me the topic name. Do not summarize yourself. \n ASSISTANT: The first topic is the topic of"
    )
    return Case(prompt=prompt, answer=f" {chosen[0]}.", depth=0.0)


def _conversation(generator: random.Random, topic: str) -> str:
    turns = [f" USER: I would like to discuss the topic of {topic}. \n ASSISTANT: {generator.choice(_OPENINGS)} \n"]
    for question in generator.sample(_QUESTIONS, 4):
        answer = " ".join(generator.sample(_STATEMENTS, 3))
        turns.append(f" USER: {question} \n ASSISTANT: {answer} \n")
    return "".join(turns)


def _passkey(generator: random.Random, num_items: int, depth: float) -> Case:
    key = generator.randint(1, LARGEST_NUMBER)
    before = round(depth * num_items)
    parts = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.",
        " ".join([_FILLER] * before),
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        " ".join([_FILLER] * (num_items - before)),
        "What is the pass key? The pass key is",
    ]
    return Case(prompt="\n".join(part for part in parts if part), answer=f" {key}.", depth=before / max(num_items, 1))


_MAKERS = {Task.LINES: _lines, Task.TOPICS: _topics, Task.PASSKEY: _passkey}
_LINES_HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains "
    "a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = (
    "able amber ancient bare bitter blank blue bold brave brief bright broad bronze busy calm careful cheap clean "
    "clear clever cold cool crisp curly damp dark deep dense dim dry dull eager early easy empty equal even fair "
    "faint famous fast fine firm flat fond frail fresh full gentle glad golden good grand gray great green grim "
    "happy hard harsh heavy high hollow honest hot huge humble idle keen kind large late lazy lean light little "
    "lively lone long loose loud low lucky mad major mild narrow near neat new nice noble odd old open pale plain "
    "polite poor"
).split()
_NOUNS = (
    "actor anchor apple arch arrow badge baker banjo barn basin basket beach bell bench bird blade boat bone book "
    "bottle bowl box branch brick bridge broom brush bucket button cabin camel candle canoe card carpet castle "
    "cave chain chair chalk cherry cliff clock cloud coat coin comb copper corner couch crane crown cup curtain "
    "desk dish doctor door dove dragon dress drum eagle engine fan farmer feather fence field flag flute forest "
    "fork fountain fox garden gate glove goat guitar hammer harbor hat helmet hill hinge horn horse house island "
    "jacket jar jewel kettle"
).split()
_ASPECTS = (
    "the history of", "the economics of", "the psychology of", "the future of", "the ethics of", "the science of",
    "the art of", "the environmental effects of", "the politics of", "the philosophy of", "the teaching of",
    "the impact of technology on", "the role of women in", "the popularity of",
)  # fmt: skip
_SUBJECTS = (
    "music", "gardening", "architecture", "cooking", "sailing", "photography", "farming", "medicine", "football",
    "astronomy", "printing", "railways", "painting", "theater", "mathematics", "tourism", "fashion", "journalism",
    "mountaineering", "chess", "bees", "bridges", "public libraries", "weather forecasts",
)  # fmt: skip
_OPENINGS = (
    "Sure, I'd be happy to discuss that topic with you. What would you like to know about it?",
    "Great choice. Where shall we begin?",
    "That is a subject with many sides. What interests you most?",
    "Of course. Is there anything in particular that you want to hear about?",
)
_QUESTIONS = (
    "What do you think is the most important thing about it?", "How has it changed over the last century?",
    "Are there common mistakes that beginners make?", "Who has had the greatest influence on it?",
    "Can you give me an example?", "Why do people disagree about it?", "What would you tell a child about it?",
    "Does it differ much from country to country?", "How could one learn more about it?",
    "What surprised you when you first read about it?",
)  # fmt: skip
_STATEMENTS = (
    "It depends on whom you ask, but most people would agree on a few points.",
    "The early years were slow, and the records that we have of them are not complete.",
    "Many small improvements mattered more than any single discovery.",
    "There is a good deal of research on it, though not all of it agrees.",
    "Money has always played a part, and so has chance.",
    "It helps to look at how it was done before, and at what was given up.",
    "A patient beginner can go further than a talented one who stops too soon.",
    "In the north it developed in another way than in the south.",
    "Books on it are easy to find, and some of them are even pleasant to read.",
    "What seems simple from outside turns out to have many parts.",
    "Some of the best work was done by people whose names are forgotten.",
    "The next ten years will probably bring more change than the last fifty.",
    "One should be careful with numbers that sound too good.",
    "It is often said that practice is all, but good advice saves time.",
    "Public interest rose quickly, fell again, and has been steady since.",
)  # fmt: skip
