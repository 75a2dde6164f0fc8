"""mem0: what is remembered is found again, by embeddings through the gateway."""

from cases import EMBEDDER, GPT, KEY, OPENAI_URL, case, run
from mem0 import Memory

PROVIDER = {"api_key": KEY, "openai_base_url": OPENAI_URL}
memory = Memory.from_config(
    {
        "llm": {"provider": "openai", "config": {"model": GPT, **PROVIDER}},
        "embedder": {"provider": "openai", "config": {"model": EMBEDDER, **PROVIDER}},
        "vector_store": {"provider": "qdrant", "config": {"path": "memories", "on_disk": True}},
    }
)
FACT = "Oslo is cold in November"


@case("remembers")
def _():
    memory.add(FACT, user_id="one", infer=False)
    found = memory.search(FACT, filters={"user_id": "one"})
    assert any(FACT in one["memory"] for one in found["results"]), found


@case("asks the model")
def _():
    memory.add([{"role": "user", "content": "My name is Ada."}], user_id="two")


run()
