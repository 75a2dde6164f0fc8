"""dspy: predictions, chains of thought and embeddings by each of its ways to a gateway."""

import dspy
from cases import (
    CLAUDE,
    EMBEDDER,
    GEMINI,
    GEMINI_URL,
    GPT,
    KEY,
    OPENAI_URL,
    QUESTION,
    answered,
    case,
    run,
)

WAYS = {
    f"openai/{GPT}": OPENAI_URL,
    f"anthropic/{CLAUDE}": OPENAI_URL,
    f"gemini/{GEMINI}": GEMINI_URL,
}


def model(way):
    return dspy.LM(way, api_base=WAYS[way], api_key=KEY, cache=False, max_tokens=2000)


def text(way):
    answered(model(way)(QUESTION)[0])


def structured(way):
    with dspy.context(lm=model(way), adapter=dspy.JSONAdapter()):
        assert dspy.Predict("question -> answer: str, sure: bool")(question=QUESTION).answer


for way in WAYS:
    for what in (text, structured):
        case(f"{way.partition('/')[0]}, {what.__name__}")(lambda what=what, way=way: what(way))


@case("embeddings")
def _():
    made = dspy.Embedder(f"openai/{EMBEDDER}", api_base=OPENAI_URL, api_key=KEY, caching=False)
    assert len(made(["one", "two"])) == 2


run()
