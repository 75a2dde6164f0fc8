"""A model of random weights for llama.cpp's server: run by the interpreter that has gguf and numpy.

    python llama_model.py FILE

Its words mean nothing; its work is a real model's: 37 million parameters in 12 layers. It says one
of some hundred words at a time, and never that it has ended where the server is run with
`--ignore-eos`. What it must never say, such as half of a character, has a row of zeros in the
output, so that its logit is 0, and the words' are spread so widely that some are always far above.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

LAYERS, WIDTH, CONTEXT = 12, 512, 32_768
HEADS, KV_HEADS, INNER = WIDTH // 64, 2, 3 * WIDTH
SPREAD = 10.0  # of the words' logits
SEED = 7
GAP = "\N{LOWER ONE EIGHTH BLOCK}"
SAID = """
tide gate river stone bridge harbour water wind salt sand shore wave boat sail rope anchor light
house tower bell north south east west morning evening night summer winter spring autumn rain
cloud snow storm sun moon star field tree leaf root branch seed flower grass hill valley
mountain road path door window roof wall floor table chair lamp book page letter word line story
song voice sound silence question answer reason number measure weight length depth height colour
red green blue white black yellow grey brown small large long short old young new early late
quick slow warm cold dry wet open closed full empty near far high low left right and or but so
then when where while because although if not never always often seldom again once twice some
many few most all none each every other same another between beyond under over through across
along around before after during since until with without within from toward the a an this that
these those it they we you he she who what which whose is was are were be has had do did can
could will would may might must say said tell told ask asked give gave take took make made find
found keep kept hold held bring brought carry carried count counted of to in
""".split()  # noqa: SIM905
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def pieces() -> tuple[list[str], list[float], list[int], list[bool]]:
    """The vocabulary: texts, scores, types, and whether each may be said. A word is put together
    from its beginnings, each of which is a piece."""
    kinds = gguf.TokenType
    rows = [
        ("<unk>", 0.0, kinds.UNKNOWN),
        ("<s>", 0.0, kinds.CONTROL),
        ("</s>", 0.0, kinds.CONTROL),
    ]
    rows += [(f"<0x{number:02X}>", 0.0, kinds.BYTE) for number in range(256)]
    rows += [(chr(number), -1e4, kinds.NORMAL) for number in range(33, 127)]
    beginnings = {GAP + word[:end] for word in SAID for end in range(len(word) + 1)}
    rows += [(text, float(len(text)) - 1e3, kinds.NORMAL) for text in sorted(beginnings)]
    whole = {GAP + word for word in SAID}
    texts, scores, types = map(list, zip(*rows, strict=True))
    return texts, scores, [int(kind) for kind in types], [text in whole for text in texts]


def write(path: Path) -> None:
    """Write the model whole, or not at all."""
    texts, scores, types, said = pieces()
    random = np.random.default_rng(SEED)
    fresh = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(fresh), "llama")
    writer.add_name("random words")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)

    def weights(name: str, rows: int, columns: int, spread: float | None = None) -> None:
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, (drawn * (spread or columns**-0.5)).astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    weights("token_embd.weight", len(texts), WIDTH, 1.0)
    output = random.standard_normal((len(texts), WIDTH), dtype=np.float32) * SPREAD * WIDTH**-0.5
    output[~np.array(said)] = 0.0
    writer.add_tensor("output.weight", output.astype(np.float16))
    norm("output_norm.weight")
    narrow = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        weights(f"{block}.attn_q.weight", WIDTH, WIDTH)
        weights(f"{block}.attn_k.weight", narrow, WIDTH)
        weights(f"{block}.attn_v.weight", narrow, WIDTH)
        weights(f"{block}.attn_output.weight", WIDTH, WIDTH)
        weights(f"{block}.ffn_gate.weight", INNER, WIDTH)
        weights(f"{block}.ffn_up.weight", INNER, WIDTH)
        weights(f"{block}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.replace(path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
